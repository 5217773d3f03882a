"""CMC + mAP + mINP from features: autoreid beside the distance product alone and the algorithms that others publish.

All get the same features, identities and cameras (Market-1501's and MSMT17's sizes, with its junk and distractors), and
all must give the same mAP. They take turns in one process, in another order each round, and the median counts: of the
time, of a round's ratio to the product beside it, and of the same ratio of processor time, which other work on the
machine hardly moves. Memory is measured apart, each in a process of its own: the most that was resident at once, less
what was resident when the features were there.

    python benchmarks/retrieval.py --size market --json results/benchmarks/retrieval.json

"easy" are embeddings of a trained network's quality; "random" ones know nothing of identities, so that positives rank
anywhere, which is the worst for an evaluation that looks only at what ranks before the last positive. Goals
(docs: retrieval-speed): easy 1.6 times the product at Market size and 1.3 times at MSMT17 size, random 3 times, 0.4 GB.
Re-ranking has a benchmark of its own, ``benchmarks/rerank.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autoreid.metrics import retrieval_metrics
from autoreid.runs import peak_memory_bytes, processor


class Size(NamedTuple):
    """How many of what, as published."""

    queries: int
    gallery: int
    identities: int
    cameras: int
    junk: int
    distractors: int


SIZES = {
    "small": Size(500, 4_000, 150, 6, 500, 400),
    "market": Size(3_368, 19_732, 750, 6, 3_819, 2_798),
    "msmt17": Size(11_659, 82_161, 3_060, 15, 0, 0),
}
NOISE = {"easy": 2.0, "random": None}  # of an image about its identity's centre
DIMS = 512
TOO_MUCH = 12e9  # bytes: what needs more is not run


class Task(NamedTuple):
    """What every evaluator is given."""

    query: np.ndarray  # N x D float32, unit length
    query_ids: np.ndarray
    query_cams: np.ndarray
    gallery: np.ndarray  # M x D
    gallery_ids: np.ndarray
    gallery_cams: np.ndarray


def make_task(size: Size, embeddings: str, seed: int = 0) -> Task:
    """Every identity at least once on either side, cameras at random, junk -1 and distractors 0 in the gallery."""
    rng = np.random.default_rng(seed)
    own = size.gallery - size.junk - size.distractors - size.identities
    gallery_ids = np.concatenate([np.arange(size.identities), rng.integers(size.identities, size=own)]) + 1
    gallery_ids = np.concatenate([gallery_ids, np.full(size.junk, -1), np.zeros(size.distractors, np.int64)])
    gallery_ids = gallery_ids[rng.permutation(size.gallery)]
    others = rng.integers(size.identities, size=size.queries - size.identities)
    query_ids = np.concatenate([np.arange(size.identities), others]) + 1
    centres = rng.standard_normal((size.identities + 1, DIMS), dtype=np.float32)

    def features(identities: np.ndarray) -> np.ndarray:
        x = rng.standard_normal((len(identities), DIMS), dtype=np.float32)
        noise = NOISE[embeddings]
        if noise is not None:
            x *= noise
            known = identities > 0
            x[known] += centres[identities[known]]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x

    query_cams, gallery_cams = (rng.integers(1, size.cameras + 1, len(ids)) for ids in (query_ids, gallery_ids))
    return Task(features(query_ids), query_ids, query_cams, features(gallery_ids), gallery_ids, gallery_cams)


# --- the evaluators: a task to mAP --------------------------------------------------------------------------------------

def product(task: Task) -> None:
    """The query x gallery product alone, in blocks of 256 rows: what any exact evaluation must do."""
    query, gallery = torch.from_numpy(task.query), torch.from_numpy(task.gallery)
    out = torch.empty(256, len(gallery))
    for start in range(0, len(query), 256):
        block = query[start : start + 256]
        torch.mm(block, gallery.T, out=out[: len(block)])


def product_whole(task: Task) -> None:
    """The same, kept as one N x M matrix."""
    torch.from_numpy(task.query) @ torch.from_numpy(task.gallery).T


def ours(task: Task) -> float:
    return retrieval_metrics(*task).mAP


def _squared_distances(task: Task) -> np.ndarray:
    """N x M: |q|^2 + |g|^2 - 2 q g, in place."""
    query, gallery = torch.from_numpy(task.query), torch.from_numpy(task.gallery)
    distances = query.square().sum(1, keepdim=True) + gallery.square().sum(1)
    return distances.addmm_(query, gallery.T, alpha=-2).numpy()


def _kept(task: Task, q: int, order: np.ndarray) -> np.ndarray:
    """Which places of query q's full ranking count: not its own camera's images of itself, not junk."""
    own = (task.gallery_ids[order] == task.query_ids[q]) & (task.gallery_cams[order] == task.query_cams[q])
    return ~own & (task.gallery_ids[order] != -1)


def _figures_of(hits: np.ndarray, per_place: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """AP, INP and CMC of one ranking of 0 and 1."""
    found = hits.cumsum()
    precision = per_place(found) * hits
    return precision.sum() / found[-1], found[-1] / (hits.nonzero()[0][-1] + 1), np.minimum(found, 1)[:50]


def _divided_at_once(found: np.ndarray) -> np.ndarray:
    return found / np.arange(1, len(found) + 1)


def _divided_one_by_one(found: np.ndarray) -> np.ndarray:
    return np.array([count / (place + 1.0) for place, count in enumerate(found)])


def full_argsort_and_matches(task: Task, per_place: Callable[[np.ndarray], np.ndarray] = _divided_at_once) -> float:
    """torchreid's way: all distances, one argsort of all of them, a matrix of all matches, then query by query."""
    order = np.argsort(_squared_distances(task), axis=1)
    matches = (task.gallery_ids[order] == task.query_ids[:, None]).astype(np.int32)
    precision = []
    for q in range(len(order)):
        hits = matches[q][_kept(task, q, order[q])]
        if hits.any():
            precision.append(_figures_of(hits, per_place)[0])
    return float(np.mean(precision))


def full_argsort_in_python(task: Task) -> float:
    """The same as published in Python: the precision of every place by a list of divisions."""
    return full_argsort_and_matches(task, _divided_one_by_one)


def full_argsort(task: Task) -> float:
    """fast-reid's way: all distances, one argsort of all of them, then query by query; mINP too."""
    order = np.argsort(_squared_distances(task), axis=1)
    figures = []
    for q in range(len(order)):
        hits = (task.gallery_ids[order[q]] == task.query_ids[q])[_kept(task, q, order[q])].astype(np.int32)
        if hits.any():
            figures.append(_figures_of(hits, _divided_at_once)[:2])
    return float(np.mean([ap for ap, _ in figures]))


class Evaluator(NamedTuple):
    """``bytes_per_pair``: of the N x M arrays that it holds at once."""

    run: Callable[[Task], float | None]
    bytes_per_pair: int = 0
    slow: bool = False  # takes part in one round only


PRODUCT, OURS = "product alone, blocks of 256", "autoreid"
EVALUATORS = {
    PRODUCT: Evaluator(product),
    "product alone, whole": Evaluator(product_whole, 4),
    OURS: Evaluator(ours),
    # distances float32 + order int64 + matches int32, and the int64 that they are compared from
    "torchreid's algorithm, NumPy": Evaluator(full_argsort_and_matches, 4 + 8 + 4 + 8),
    "torchreid's algorithm, Python": Evaluator(full_argsort_in_python, 4 + 8 + 4 + 8, slow=True),
    "fast-reid's algorithm, NumPy": Evaluator(full_argsort, 4 + 8),
}


# --- measuring ----------------------------------------------------------------------------------------------------------

def time_all(size: Size, embeddings: str, names: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per evaluator: medians over rounds in which each takes its turn."""
    torch.set_num_threads(threads)
    task = make_task(size, embeddings)
    product(make_task(SIZES["small"], "random"))  # start the threads
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    accuracy: dict[str, float | None] = {}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if number and (EVALUATORS[name].slow or EVALUATORS[name].bytes_per_pair * size.queries * size.gallery > 5e9):
                continue  # one round of minutes
            gc.collect()
            begin, cpu = time.perf_counter(), time.process_time()
            accuracy[name] = EVALUATORS[name].run(task)
            turns[name].append((time.perf_counter() - begin, time.process_time() - cpu))
            print(f"{embeddings}, round {number + 1}: {name} {turns[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    rows = []
    for name in names:
        ratios = [[a / b for a, b in zip(turn, base)] for turn, base in zip(turns[name], turns[PRODUCT])]
        rows.append({
            "name": name,
            "seconds": statistics.median(turn[0] for turn in turns[name]),
            "ratio": statistics.median(ratio[0] for ratio in ratios),
            "cpu_seconds": statistics.median(turn[1] for turn in turns[name]),
            "cpu_ratio": statistics.median(ratio[1] for ratio in ratios),
            "rounds": len(turns[name]),
            "mAP": accuracy[name],
        })
    return rows


def peak_of(size: Size, embeddings: str, name: str, threads: int) -> int:
    """Bytes resident at most while this evaluator runs, less those before. In a process of its own."""
    torch.set_num_threads(threads)
    task = make_task(size, embeddings)
    EVALUATORS[name].run(make_task(SIZES["small"], "random"))  # what libraries keep from their first use on is no cost
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = _resident()
    EVALUATORS[name].run(task)
    return max(0, _peak() - before)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _peak() -> int:
    return _status("VmHWM") or peak_memory_bytes()


def _resident() -> int:
    return _status("VmRSS") or _peak()


def measure(size_name: str, embeddings: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """All rows for one size and kind of embeddings."""
    size = SIZES[size_name]
    pairs = size.queries * size.gallery
    limit = min(TOO_MUCH, 0.9 * (_available() or TOO_MUCH))
    needs = {name: evaluator.bytes_per_pair * pairs for name, evaluator in EVALUATORS.items()}
    fits = [name for name in EVALUATORS if needs[name] <= limit and not (EVALUATORS[name].slow and size_name == "msmt17")]
    # Each in a fresh process: what one leaves in the allocator is not the next one's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = pool.submit(time_all, size, embeddings, fits, rounds, threads).result()
        for row in rows:
            row["peak_bytes"] = pool.submit(peak_of, size, embeddings, row["name"], threads).result()
    for name in EVALUATORS:
        if needs[name] > limit:
            rows.append({"name": name, "not_run": f"needs {needs[name] / 1e9:.1f} GB", "peak_bytes": needs[name]})
    return [{"size": size_name, "embeddings": embeddings, **row} for row in rows]


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def show(rows: list[dict[str, Any]]) -> None:
    """One table per size and kind of embeddings."""
    for size, embeddings in dict.fromkeys((row["size"], row["embeddings"]) for row in rows):
        shape = SIZES[size]
        print(f"\n{size}: {shape.queries:,} x {shape.gallery:,} x {DIMS}, {embeddings} embeddings")
        print(f"{'':32}{'seconds':>9}{'/ product':>11}{'CPU / product':>15}{'extra memory':>15}{'mAP':>10}")
        for row in rows:
            if (row["size"], row["embeddings"]) != (size, embeddings):
                continue
            if "not_run" in row:
                print(f"{row['name']:32}not run: {row['not_run']}")
                continue
            accuracy = "" if row["mAP"] is None else f"{row['mAP']:.6f}"
            print(
                f"{row['name']:32}{row['seconds']:9.2f}{row['ratio']:11.2f}{row['cpu_ratio']:15.2f}"
                f"{row['peak_bytes'] / 1e6:12,.0f} MB{accuracy:>10}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="market", help=f"any of {', '.join(SIZES)}, with commas between")
    parser.add_argument("--embeddings", default="easy,random", help=f"any of {', '.join(NOISE)}, with commas between")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each evaluator; at MSMT17 size one is minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", default=None, help="write the rows, or add those of another size")
    chosen = parser.parse_args()
    rows = []
    for size in chosen.size.split(","):
        for embeddings in chosen.embeddings.split(","):
            rows += measure(size, embeddings, chosen.rounds, chosen.threads)
    show(rows)
    if chosen.json:
        record(Path(chosen.json), rows, chosen.threads)
    return 0


def record(path: Path, rows: list[dict[str, Any]], threads: int) -> None:
    """Write the rows with what they were measured on and by; rows of other sizes that are there stay."""
    command = shlex.join(["python", "benchmarks/retrieval.py", *sys.argv[1:]])
    measured = {(row["size"], row["embeddings"]) for row in rows}
    before = json.loads(path.read_text()) if path.exists() else {"command": "", "rows": []}
    kept = [row for row in before["rows"] if (row["size"], row["embeddings"]) not in measured]
    commands = [line for line in before["command"].split(" && ") if line and line != command] if kept else []
    result = {
        "command": " && ".join([*commands, command]),
        "machine": f"{processor()}, {threads} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "rows": kept + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

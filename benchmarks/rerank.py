"""k-reciprocal re-ranking from features: autoreid beside the all-by-all product alone and the dense published algorithm.

All get the features of ``benchmarks/retrieval.py`` (Market-1501's and MSMT17's sizes) and must give the same mAP. They
take turns in one process, in another order each round, and the median counts: of the time, of a round's ratio to the
product beside it, and of the same ratio of processor time, which other work on the machine moves less. Memory is
measured apart, each in a process of its own: the most that was resident at once, less what was resident when the
features were there. The dense algorithm takes minutes, so it gets one round, its memory is taken in that round, and it
is not run where the machine has no room for its matrices. No round keeps autoreid's N x M result: metrics consume it
block by block, which is timed with it.

    python benchmarks/rerank.py --size market --json results/benchmarks/rerank.json
    python benchmarks/rerank.py --size msmt17 --rounds 1 --json results/benchmarks/rerank.json

Goals: Market size within 2 times its product and 0.5 GB, MSMT17 size within 4 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import re
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval import DIMS, NOISE, SIZES, Task, make_task

from autoreid.metrics import metrics_from_blocks, retrieval_metrics
from autoreid.rerank import rerank, reranked_blocks
from autoreid.runs import peak_memory_bytes, processor, write_json

K1, K2, LAM = 20, 6, 0.3
PRODUCT, OURS, DENSE = "product alone, blocks of 256", "autoreid", "published algorithm, dense"
# distances and V float32, ranking int64 and its int32 copy, all T x T at once
DENSE_BYTES_PER_PAIR = 4 + 4 + 8 + 4


def product(task: Task) -> None:
    """Everybody's product with everybody: what finding all neighbours exactly must do."""
    images = torch.from_numpy(np.concatenate([task.query, task.gallery]))
    out = torch.empty(256, len(images))
    for start in range(0, len(images), 256):
        block = images[start : start + 256]
        torch.mm(block, images.T, out=out[: len(block)])


def ours(task: Task) -> float:
    blocks = reranked_blocks(task.query, task.gallery, K1, K2, LAM)
    return metrics_from_blocks(blocks, *task[1:3], *task[4:6]).mAP


def dense(task: Task) -> np.ndarray:
    """The authors' algorithm as their Python version describes it: T x T matrices, one full sort, a loop over images."""
    images = np.concatenate([task.query, task.gallery])
    count, total = len(task.query), len(images)
    squared = np.square(images).sum(1)
    distances = images @ images.T
    distances *= -2
    distances += squared
    distances += squared[:, None]
    np.maximum(distances, 0, out=distances)
    distances /= distances.max(1, keepdims=True)
    features = np.zeros_like(distances)
    ranking = np.argsort(distances).astype(np.int32)

    for image in range(total):
        expanded = members = reciprocal(ranking, image, K1)
        for member in members:
            smaller = reciprocal(ranking, member, round(K1 / 2))
            if len(np.intersect1d(smaller, members)) > 2 / 3 * len(smaller):
                expanded = np.append(expanded, smaller)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[image, expanded])
        features[image, expanded] = weights / weights.sum()
    distances = distances[:count, count:].copy()  # frees the rest
    nearest = ranking[:, :K2].copy()
    del ranking
    mean = np.empty_like(features)
    for image in range(total):
        mean[image] = features[nearest[image]].mean(0)
    features = mean
    del mean
    holders = [np.nonzero(features[:, image])[0] for image in range(total)]
    for query in range(count):
        shared = np.zeros(total, np.float32)
        for image in np.nonzero(features[query])[0]:
            shared[holders[image]] += np.minimum(features[query, image], features[holders[image], image])
        distances[query] *= LAM
        distances[query] += (1 - LAM) * (1 - shared / (2 - shared))[count:]
    return distances


def reciprocal(ranking: np.ndarray, image: int, k: int) -> np.ndarray:
    """Its k nearest, itself too, who have it among theirs."""
    forward = ranking[image, : k + 1]
    return forward[(ranking[forward, : k + 1] == image).any(1)]


# --- measuring ----------------------------------------------------------------------------------------------------------

def time_all(size: str, embeddings: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """The product's row and ours: medians over rounds in which each takes its turn."""
    torch.set_num_threads(threads)
    for run in (product, ours):
        run(make_task(SIZES["small"], embeddings))  # start the threads
    task = make_task(SIZES[size], embeddings)
    names = {PRODUCT: product, OURS: ours}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    accuracy = {PRODUCT: retrieval_metrics(*task).mAP}
    for number in range(rounds):
        for name in list(names)[:: -1 if number % 2 else 1]:
            gc.collect()
            begin, cpu = time.perf_counter(), time.process_time()
            result = names[name](task)
            turns[name].append((time.perf_counter() - begin, time.process_time() - cpu))
            accuracy[name] = accuracy[name] if result is None else result
            print(f"{size}, round {number + 1}: {name} {turns[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    rows = []
    for name in names:
        ratios = [[a / b for a, b in zip(turn, base)] for turn, base in zip(turns[name], turns[PRODUCT])]
        rows.append({
            "name": name,
            "seconds": statistics.median(turn[0] for turn in turns[name]),
            "ratio": statistics.median(ratio[0] for ratio in ratios),
            "cpu_seconds": statistics.median(turn[1] for turn in turns[name]),
            "cpu_ratio": statistics.median(ratio[1] for ratio in ratios),
            "rounds": rounds,
            "mAP": accuracy[name],
        })
    return rows


def time_dense(size: str, embeddings: str, threads: int) -> dict[str, Any]:
    """The dense algorithm's row, and how far its distances are from ours."""
    torch.set_num_threads(threads)
    task = make_task(SIZES[size], embeddings)
    before = forget_peak()
    begin, cpu = time.perf_counter(), time.process_time()
    distances = dense(task)
    took, busy = time.perf_counter() - begin, time.process_time() - cpu
    peak = peak_memory_bytes() - before
    print(f"{size}: {DENSE} {took:.2f} s", file=sys.stderr, flush=True)
    apart = np.abs(distances - rerank(task.query, task.gallery, K1, K2, LAM))
    return {
        "name": DENSE, "seconds": took, "cpu_seconds": busy, "rounds": 1, "peak_bytes": peak,
        "mAP": metrics_from_blocks([(0, distances)], *task[1:3], *task[4:6]).mAP,
        "entries_off_by_1e-5": float((apart > 1e-5).mean()), "largest_difference": float(apart.max()),
    }


def peak_of(name: str, size: str, embeddings: str, threads: int) -> int:
    """Bytes resident at most, less those before; in a process of its own."""
    torch.set_num_threads(threads)
    run = {PRODUCT: product, OURS: ours}[name]
    run(make_task(SIZES["small"], embeddings))  # what libraries keep from their first use on is no cost
    task = make_task(SIZES[size], embeddings)
    before = forget_peak()
    run(task)
    return peak_memory_bytes() - before


def forget_peak() -> int:
    """Bytes resident now; on Linux the peak counts from here, elsewhere it is that of the whole process."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    return peak_memory_bytes()


def available_bytes() -> float:
    """What the system could still give; everything where it cannot tell."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return float("inf")


def measure(size: str, embeddings: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """All rows for one size and kind of embeddings."""
    need = DENSE_BYTES_PER_PAIR * (SIZES[size].queries + SIZES[size].gallery) ** 2
    # Each in a fresh process: what one leaves in the allocator is not the next one's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = pool.submit(time_all, size, embeddings, rounds, threads).result()
        for row in rows:
            row["peak_bytes"] = pool.submit(peak_of, row["name"], size, embeddings, threads).result()
        if need > 0.9 * available_bytes():
            rows.append({"name": DENSE, "not_run": f"needs {need / 1e9:.1f} GB", "peak_bytes": need})
        else:
            row = pool.submit(time_dense, size, embeddings, threads).result()
            row["ratio"], row["cpu_ratio"] = (row[key] / rows[0][key] for key in ("seconds", "cpu_seconds"))
            rows.append(row)
    return [{"size": size, "embeddings": embeddings, "threads": threads, **row} for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """One table per size and kind of embeddings."""
    for size, embeddings in dict.fromkeys((row["size"], row["embeddings"]) for row in rows):
        shape = SIZES[size]
        print(f"\n{size}: {shape.queries:,} + {shape.gallery:,} images x {DIMS}, {embeddings} embeddings")
        print(f"{'':30}{'threads':>8}{'seconds':>9}{'/ product':>11}{'CPU / product':>15}{'extra memory':>15}{'mAP':>10}")
        for row in rows:
            if (row["size"], row["embeddings"]) != (size, embeddings):
                continue
            if "not_run" in row:
                print(f"{row['name']:30}not run: {row['not_run']}")
                continue
            print(
                f"{row['name']:30}{row['threads']:8}{row['seconds']:9.2f}{row['ratio']:11.2f}{row['cpu_ratio']:15.2f}"
                f"{row['peak_bytes'] / 1e6:12,.0f} MB{row['mAP']:10.6f}"
            )
            if "largest_difference" in row:
                share, most = row["entries_off_by_1e-5"], row["largest_difference"]
                print(f"  differs from autoreid's by more than 1e-5 in {share:.1e} of the entries, at most {most:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="market", help=f"any of {', '.join(SIZES)}, with commas between")
    parser.add_argument("--embeddings", default="easy", help=f"any of {', '.join(NOISE)}, with commas between")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; at MSMT17 size one is minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", default=None, help="write the rows, or add those of another size")
    chosen = parser.parse_args()
    rows = []
    for size in chosen.size.split(","):
        for embeddings in chosen.embeddings.split(","):
            rows += measure(size, embeddings, chosen.rounds, chosen.threads)
    show(rows)
    if chosen.json:
        record(Path(chosen.json), rows)
    return 0


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows with what they were measured on and by; rows of other sizes that are there stay."""
    command = shlex.join(["python", "benchmarks/rerank.py", *sys.argv[1:]])
    measured = {(row["size"], row["embeddings"]) for row in rows}
    before = json.loads(path.read_text()) if path.exists() else {"command": "", "rows": []}
    kept = [row for row in before["rows"] if (row["size"], row["embeddings"]) not in measured]
    commands = [line for line in before["command"].split(" && ") if line and line != command] if kept else []
    write_json(path, {
        "command": " && ".join([*commands, command]),
        "machine": processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "settings": {"k1": K1, "k2": K2, "lambda": LAM},
        "rows": kept + rows,
    })


if __name__ == "__main__":
    sys.exit(main())

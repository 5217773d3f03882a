"""How long the nearest gallery vectors take: autoreid's exact searches in float and in integers, beside PyTorch's product
and faiss.

Every engine answers the same queries, one by one and all at once, in a process of its own; they take turns, in another
order each round, and the median counts. ``ratio`` is a query's time in the batch to that of the plain product and ``topk``.
Memory is what the engine keeps of the gallery, and the most that was resident while it was built and searched, less what
was resident when the vectors were there. Recall is the share of the 10 exact nearest that an engine finds.

    python benchmarks/neighbours.py --size market,100k --json results/benchmarks/neighbours.json

The vectors are those of a network of middling quality: identities' centres and noise, of length one. Goals (docs:
retrieval-speed, 100,000 x 128): exact in batches no slower than the plain product and topk (0.41 ms), which beats faiss
flat (2.6); int8 with a recall of 0.99 at a quarter of the memory and no slower than float.
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
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autoreid.neighbours import ENGINES, Found, measure_search
from autoreid.runs import peak_memory_bytes, processor


class Size(NamedTuple):
    queries: int
    gallery: int
    dims: int


SIZES = {
    "small": Size(256, 5_000, 128),
    "market": Size(3_368, 19_732, 512),
    "50k": Size(256, 50_000, 512),
    "100k": Size(256, 100_000, 128),
    "1m": Size(256, 1_000_000, 128),
}
NOISE, PER_IDENTITY, K = 1.0, 20, 10
PRODUCT = "PyTorch's product and topk"


class Product:
    """What one writes without a library: the whole query x gallery matrix, and topk."""

    def __init__(self, features: torch.Tensor) -> None:
        self.vectors, self.squares = features, features.square().sum(1)

    @property
    def bytes(self) -> int:
        return self.vectors.nbytes + self.squares.nbytes

    def search(self, query: torch.Tensor, k: int) -> Found:
        distances = torch.addmm(self.squares, query, self.vectors.T, alpha=-2) + query.square().sum(1, keepdim=True)
        nearest = distances.topk(k, largest=False)
        return Found(nearest.values.clamp(min=0).sqrt().numpy(), nearest.indices.numpy())


ALL: dict[str, Any] = {PRODUCT: Product, **ENGINES}


def make_vectors(size: Size, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Query Q x D and gallery N x D float32."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, size.gallery // PER_IDENTITY), size.dims), dtype=np.float32)

    def vectors(count: int) -> np.ndarray:
        x = rng.standard_normal((count, size.dims), dtype=np.float32)
        x *= NOISE
        x += centres[rng.integers(len(centres), size=count)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x

    return vectors(size.queries), vectors(size.gallery)


def turn(size: Size, name: str, threads: int) -> dict[str, Any]:
    """One engine, measured in a process of its own."""
    torch.set_num_threads(threads)
    measure_search({name: ALL[name]}, *make_vectors(SIZES["small"]), K)  # what libraries load on first use is no cost
    query, gallery = make_vectors(size)
    [row] = measure_search({name: ALL[name]}, query, gallery, K)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before, begin, cpu = _resident(), time.perf_counter(), time.process_time()
    built = ALL[name](torch.from_numpy(gallery))
    built.search(torch.from_numpy(query), K)
    return {**row, "peak_bytes": max(0, _peak() - before),
            "busy": (time.process_time() - cpu) / (time.perf_counter() - begin)}


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


def measure(size_name: str, names: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per engine: medians over the rounds."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                turns[name].append(pool.submit(turn, SIZES[size_name], name, threads).result())
                ms = turns[name][-1]["ms_per_query"]
                print(f"{size_name}, round {number + 1}: {name} {ms['1']:.3f} ms, in the batch {ms['all']:.3f} ms",
                      file=sys.stderr, flush=True)

    def median(name: str, *keys: str) -> float:
        values: list[Any] = turns[name]
        for key in keys:
            values = [value[key] for value in values]
        return statistics.median(values)

    base = median(PRODUCT, "ms_per_query", "all") if PRODUCT in names else None
    return [{
        "size": size_name, "name": name, "seconds": median(name, "ms_per_query", "all") / 1e3,
        "seconds_alone": median(name, "ms_per_query", "1") / 1e3,
        "ratio": median(name, "ms_per_query", "all") / base if base else None,
        "build_seconds": median(name, "build_seconds"), "bytes": turns[name][0]["bytes"],
        "peak_bytes": int(median(name, "peak_bytes")), "recall": median(name, "recall"), "busy": median(name, "busy"),
        "rounds": rounds,
    } for name in names]


def show(rows: list[dict[str, Any]]) -> None:
    """One table per size."""
    for size in dict.fromkeys(row["size"] for row in rows):
        shape = SIZES[size]
        print(f"\n{size}: {shape.queries:,} queries, gallery {shape.gallery:,} x {shape.dims}, the {K} nearest")
        print(f"{'':28}{'ms, alone':>11}{'in a batch':>12}{'/ product':>11}{'build, s':>10}{'keeps, MB':>11}"
              f"{'peak, MB':>10}{'recall':>9}")
        for row in rows:
            if row["size"] == size:
                ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
                print(f"{row['name']:28}{1e3 * row['seconds_alone']:11.3f}{1e3 * row['seconds']:12.3f}{ratio:>11}"
                      f"{row['build_seconds']:10.2f}{row['bytes'] / 1e6:11.1f}{row['peak_bytes'] / 1e6:10.0f}"
                      f"{row['recall']:9.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="market,100k", help=f"any of {', '.join(SIZES)}, with commas between")
    parser.add_argument("--engines", default="all", help=f"any of {', '.join(ENGINES)}, with commas between, beside the "
                        "plain product; at 1m the graph of faiss-hnsw takes long to build")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default=None, help="write the rows, or add those of another size")
    chosen = parser.parse_args()
    names = list(ALL) if chosen.engines == "all" else [PRODUCT, *chosen.engines.split(",")]
    rows = [row for size in chosen.size.split(",") for row in measure(size, names, chosen.rounds, chosen.threads)]
    show(rows)
    if chosen.json:
        record(Path(chosen.json), rows, chosen.threads)
    return 0


def record(path: Path, rows: list[dict[str, Any]], threads: int) -> None:
    """Write the rows with what they were measured on and by; rows of other sizes that are there stay."""
    command = shlex.join(["python", "benchmarks/neighbours.py", *sys.argv[1:]])
    measured = {row["size"] for row in rows}
    before = json.loads(path.read_text()) if path.exists() else {"command": "", "rows": []}
    kept = [row for row in before["rows"] if row["size"] not in measured]
    commands = [line for line in before["command"].split(" && ") if line and line != command] if kept else []
    result = {
        "command": " && ".join([*commands, command]),
        "machine": f"{processor()}, {threads} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "faiss": metadata.version("faiss-cpu")},
        "rows": kept + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

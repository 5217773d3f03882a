"""Training batches from JPEG: autoreid's loader beside the usual one (PIL + torchvision transforms, picture by picture).

All do the same: read, resize, mirror, pad by 10 and crop, normalise, erase; the same P x K batches of the same files, in
one process with one torch thread (the usual loader gains nothing from a second). They take turns, in another order each
time, and the median counts: of the time, of a turn's ratio to the usual loader's turn beside it, and of the same ratio
of processor time, which other work on the machine moves less. The goal from the cache is 8 times the usual loader at
256x128 and 3.5 times at 384x128.

    python benchmarks/loading.py --json results/benchmarks/loading.json

"uint8 out" leaves normalising and erasing to ``finish`` on the device. "peak" is the memory that a first epoch takes in
all, kept pictures included (those of a cache file are pages that the system can take back).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from autoreid import data
from autoreid.loading import IMAGENET_MEAN, IMAGENET_STD, PKSampler, TrainLoader, relabel
from autoreid.runs import processor

USUAL = "usual: PIL + transforms v1"
Epoch = Callable[[int], Iterable[Any]]


class Usual(Dataset):
    """A picture at a time, decoded each time: what the peers' loaders do."""

    def __init__(self, samples: list[data.Sample], labels: list[int], transform: Callable) -> None:
        self.samples, self.labels, self.transform = samples, labels, transform

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.samples[i].path).convert("RGB")), self.labels[i]


def transforms_v1(size: tuple[int, int]) -> Callable:
    return v1.Compose([
        v1.Resize(size), v1.RandomHorizontalFlip(), v1.Pad(10), v1.RandomCrop(size), v1.ToTensor(),
        v1.Normalize(IMAGENET_MEAN, IMAGENET_STD), v1.RandomErasing(),
    ])


def transforms_v2(size: tuple[int, int]) -> Callable:
    return v2.Compose([
        v2.Resize(size), v2.RandomHorizontalFlip(), v2.Pad(10), v2.RandomCrop(size), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.RandomErasing(),
    ])


def loaders(samples: list[data.Sample], size: tuple[int, int], folder: Path) -> dict[str, Callable[[], Epoch]]:
    """What is compared: a name, and how to make the function from an epoch's number to its batches."""
    labels, _ = relabel(samples)
    sampler = PKSampler(labels, 16, 4)

    def usual(transform: Callable) -> Epoch:
        dataset = Usual(samples, labels, transform)
        return lambda epoch: DataLoader(dataset, batch_sampler=sampler.batches(epoch))

    def ours(**options: Any) -> Epoch:
        return TrainLoader(samples, labels, size, sampler, **options).epoch

    def fresh(epoch: int) -> Iterable[Any]:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            yield from ours(cache=empty)(epoch)

    return {
        USUAL: lambda: usual(transforms_v1(size)),
        "usual: PIL + transforms v2": lambda: usual(transforms_v2(size)),
        "autoreid, nothing kept": lambda: ours(cache_bytes=0),
        "autoreid, first epoch of a cache file": lambda: fresh,
        "autoreid, kept in memory": lambda: ours(cache_bytes=1 << 40),
        "autoreid, cache file": lambda: ours(cache=folder),
        "autoreid, cache file, uint8 out": lambda: ours(cache=folder, raw=True),
    }


def measure(samples: list[data.Sample], size: tuple[int, int], repeats: int, folder: Path) -> list[dict]:
    """A row per loader: seconds for all pictures once (median and quartiles), against the usual loader's."""
    epochs: dict[str, Epoch] = {}
    seconds: dict[str, list[float]] = {}
    processor_seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name, make in loaders(samples, size, folder).items():
        before = reset_peak()
        epochs[name], seconds[name], processor_seconds[name] = make(), [], []
        images = consume(epochs[name](0))  # the first is no measurement: it fills what is kept
        peaks[name] = None if before is None else memory("VmHWM") - before
    for repeat in range(repeats):
        names = list(epochs)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            begin, busy = time.perf_counter(), time.process_time()
            consume(epochs[name](1 + repeat))
            seconds[name].append(time.perf_counter() - begin)
            processor_seconds[name].append(time.process_time() - busy)
        print(f"{size[0]}x{size[1]}: {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    rows = []
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        busy = processor_seconds[name]
        rows.append({
            "name": name, "input": list(size), "seconds": median, "quartiles": [low, high],
            "processor_seconds": statistics.median(busy), "images_per_second": images / median,
            "ratio": faster(seconds[USUAL], times), "processor_ratio": faster(processor_seconds[USUAL], busy),
            "peak_bytes": peaks[name],
        })
    return rows


def faster(usual: list[float], own: list[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(usual, own, strict=True))


def consume(batches: Iterable[Any]) -> int:
    """How many pictures; one batch is held at a time, as in training."""
    count = 0
    for batch in batches:
        count += len(batch[-1])
    return count


def memory(what: str) -> int:
    """This process' memory (VmRSS) or its peak (VmHWM), in bytes."""
    return 1024 * int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak() -> int | None:
    """The memory now, which becomes the peak; None where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory("VmRSS")


def show(rows: list[dict]) -> None:
    print(f"{'input':9} {'loader':40} {'images/s':>9} {'x usual':>8} {'x CPU':>6} {'quartiles, s':>15} {'peak MB':>8}")
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        quartiles = "-".join(f"{q:.3f}" for q in row["quartiles"])
        print(f"{row['input'][0]}x{row['input'][1]:<5} {row['name']:40} {row['images_per_second']:>9,.0f} "
              f"{row['ratio']:>8.2f} {row['processor_ratio']:>6.2f} {quartiles:>15} {peak:>8}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", default="drawn-people", help="its training pictures (drawn ones are 128x64 JPEG)")
    parser.add_argument("--root", default=None, help="folder of the dataset")
    parser.add_argument("--images", type=int, default=512, help="how many of them")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", metavar="FILE", default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    samples = list(data.load(chosen.dataset, chosen.root, parts=("train",)).train[: chosen.images])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ((256, 128), (384, 128)):
            rows += measure(samples, size, chosen.repeats, Path(folder))
    show(rows)
    if chosen.json:
        record = {
            "command": shlex.join(["python", "benchmarks/loading.py", *sys.argv[1:]]),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__, "pillow": PIL.__version__},
            "dataset": chosen.dataset, "images": len(samples), "threads": chosen.threads, "rows": rows,
        }
        Path(chosen.json).parent.mkdir(parents=True, exist_ok=True)
        Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

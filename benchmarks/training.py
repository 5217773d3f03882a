"""Training steps per second: autoreid's loop beside a plain PyTorch loop of the same network, batches and losses.

The plain loop is what one would write by hand: forward, cross-entropy and batch-hard triplet, backward, step. Both get
the same finished batches from memory, so that only the loops differ; they take turns in one process, in another order
each round, and the medians count: of images/s, of a round's ratio to the plain loop beside it (goal 0.97 or more for the
plain recipe; more with compile) and of the same ratio of processor time, which other work on the machine moves less.
Then one process with the whole command (loader, curves and checkpoint included), and two joined by torchrun at the same
global batch, each with one thread, in turns too.

    python benchmarks/training.py --json results/benchmarks/training.json
    python benchmarks/training.py --device cuda --model resnet50 --input 256x128 --batch 32x4 --steps 50

``--compile`` adds the compiled loops: the first step then takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoreid import data
from autoreid.losses import batch_hard_triplet
from autoreid.network import find_model
from autoreid.options import split_pairs
from autoreid.recipe import Recipe
from autoreid.runs import peak_memory_bytes, processor
from autoreid.train import Learner

PLAIN = "plain PyTorch loop"
Batch = tuple[Tensor, Tensor]


def batches(recipe: Recipe, count: int, device: str) -> list[Batch]:
    """Random pictures, P x K labels: what they show does not change the work."""
    generator = torch.Generator().manual_seed(0)
    size = recipe.identities * recipe.images
    labels = torch.arange(recipe.identities).repeat_interleave(recipe.images).to(device)
    return [(torch.randn(size, 3, *recipe.input, generator=generator).to(device), labels) for _ in range(count)]


def plain_loop(net: nn.Module, recipe: Recipe, device: str, compiled: bool) -> Callable[[Batch], None]:
    """One step as one would write it for this network and these losses."""
    net = net.to(device).train()
    classifier = nn.Linear(net.dims, recipe.identities, bias=False).to(device)
    optimizer = torch.optim.Adam([*net.parameters(), *classifier.parameters()], recipe.lr,
                                 weight_decay=recipe.weight_decay)
    branches = torch.compile(net.branches) if compiled else net.branches

    def step(batch: Batch) -> None:
        images, labels = batch
        (branch,) = branches(images)
        ce = nn.functional.cross_entropy(classifier(branch.classified), labels, label_smoothing=recipe.label_smoothing)
        loss = ce + batch_hard_triplet(branch.metric, labels, recipe.margin)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # everyone looks at the loss

    return step


def own_loop(net: nn.Module, recipe: Recipe, device: str) -> Callable[[Batch], None]:
    learner = Learner(net, recipe.identities, recipe, 0, device)
    learner.module.train()

    def step(batch: Batch) -> None:
        images, labels = batch
        if recipe.channels_last:
            images = images.to(memory_format=torch.channels_last)
        learner.step([(images, labels)])[0].item()

    return step


def loops(build: Callable[[], nn.Module], recipe: Recipe, device: str, compiled: bool) -> dict[str, Callable]:
    """Every loop with a network of its own, of the same first weights."""
    changes: dict[str, dict[str, Any]] = {
        "autoreid": {}, "autoreid, channels last": {"channels_last": True}, "autoreid, bf16": {"amp": "bf16"},
    }
    if compiled:
        changes["autoreid, compiled"] = {"compile": True}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build()

    made = {PLAIN: plain_loop(fresh(), recipe, device, False)}
    if compiled:
        made[f"{PLAIN}, compiled"] = plain_loop(fresh(), recipe, device, True)
    return {**made, **{name: own_loop(fresh(), replace(recipe, **fields), device) for name, fields in changes.items()}}


def measure_loops(build: Callable[[], nn.Module], recipe: Recipe, device: str, steps: int, rounds: int,
                  compiled: bool) -> list[dict[str, Any]]:
    made, given = loops(build, recipe, device, compiled), batches(recipe, min(steps, 4), device)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for step in made.values():
        for batch in given[:2]:  # what is set up at the first step is no part of the rate
            step(batch)
    for number in range(rounds):
        names = list(made)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin, cpu = time.perf_counter(), time.process_time()
            for index in range(steps):
                made[name](given[index % len(given)])
            turns[name].append((time.perf_counter() - begin, time.process_time() - cpu))
            print(f"round {number + 1}: {name} {turns[name][-1][0] / steps:.3f} s a step", file=sys.stderr, flush=True)
    size = recipe.identities * recipe.images
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else peak_memory_bytes()
    rows = []
    for name, taken in turns.items():
        seconds = statistics.median(turn[0] for turn in taken) / steps
        ratio, cpu_ratio = (
            statistics.median(plain[i] / own[i] for plain, own in zip(turns[PLAIN], taken, strict=True)) for i in (0, 1)
        )
        rows.append({"name": name, "seconds": seconds, "images_per_second": size / seconds, "ratio": ratio,
                     "cpu_ratio": cpu_ratio, "rounds": rounds, "peak_bytes": peak})
    return rows


def measure_processes(
    model: str, changes: dict[str, str], recipe: Recipe, device: str, rounds: int
) -> list[dict[str, Any]]:
    """The command on the drawn people, one process and two, from the rate that the result gives."""
    data.load("drawn-people-tiny", None, parts=("train",))  # drawn now, not in a turn
    rates: dict[str, list[float]] = {"whole command, 1 process": [], "whole command, 2 processes": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count, name in enumerate(rates, start=1):
                out = Path(folder) / f"{number}-{count}"
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if count == 2 else []
                options = [f"{key}={value}" for key, value in {
                    **changes, "identities": recipe.identities, "images": recipe.images, "warmup_epochs": 0,
                }.items()]
                sets = [word for option in options for word in ("--set", option)]
                subprocess.run(
                    [sys.executable, *start, "-m", "autoreid", "retrain", model, "--dataset", "drawn-people-tiny",
                     "--device", device, "--recipe", "default", "--input", "x".join(map(str, recipe.input)),
                     "--epochs", "3", "--out", str(out), *sets],
                    check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                )
                (path,) = (out / "drawn-people-tiny").glob("*.json")
                rates[name].append(json.loads(path.read_text())["train"]["images_per_second"])
                print(f"round {number + 1}: {name} {rates[name][-1]:.1f} images/s", file=sys.stderr, flush=True)
    (one, two) = rates.values()
    ratios = {"whole command, 1 process": [1.0], "whole command, 2 processes": [b / a for a, b in zip(one, two)]}
    size = recipe.identities * recipe.images
    return [{"name": name, "seconds": size / statistics.median(rate), "images_per_second": statistics.median(rate),
             "ratio": statistics.median(ratios[name]), "rounds": rounds} for name, rate in rates.items()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="of the model")
    parser.add_argument("--input", default="128x64")
    parser.add_argument("--batch", default="8x4", help="identities x images")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-processes", action="store_true", help="leave out the runs with one and two processes")
    parser.add_argument("--json", metavar="FILE", default=None, help="write the rows")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    height, width = (int(side) for side in chosen.input.split("x"))
    identities, images = (int(number) for number in chosen.batch.split("x"))
    recipe = Recipe(input=(height, width), identities=identities, images=images)
    changes = split_pairs(chosen.changes)
    spec = find_model(chosen.model, changes)
    rows = measure_loops(spec.build, recipe, chosen.device, chosen.steps, chosen.rounds, chosen.compile)
    if not chosen.no_processes:
        rows += measure_processes(chosen.model, changes, recipe, chosen.device, min(chosen.rounds, 3))
    print(f"{chosen.model} {chosen.input}, batch {chosen.batch}, {chosen.device}, one thread a process")
    print(f"{'':32}{'s/step':>9}{'images/s':>10}{'ratio':>8}{'CPU ratio':>11}")
    for row in rows:
        cpu = f"{row['cpu_ratio']:11.2f}" if "cpu_ratio" in row else ""
        print(f"{row['name']:32}{row['seconds']:9.3f}{row['images_per_second']:10.1f}{row['ratio']:8.2f}{cpu}")
    if chosen.json:
        device = processor() if chosen.device == "cpu" else torch.cuda.get_device_name()
        path = Path(chosen.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
            "machine": f"{device}, 1 thread a process",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": {"model": spec.label, "input": chosen.input, "batch": chosen.batch}, "rows": rows,
        }, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Embeddings of fewer bytes, side by side: each method of the compression study trained, or measured, at each size.

McDermott, "Embedding Compression for Efficient Re-Identification" (2024). What a method is stands in
``autoreid.compression``; here is which networks a question asks for, in which order they are trained, and what became of
them. Every training is one of ``train.retrain`` and resumes by itself; a finished one that answers the same question is
not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoreid.errors import UserError, unknown
from autoreid.network import ModelSpec
from autoreid.recipe import Recipe, step_of_pruning
from autoreid.runs import folder_name, forget_peak_memory, say
from autoreid.train import retrain

TRAINED = ("full", "slice", "low-rank", "prune")
FITTED = ("pca", "pq")
METHODS = (*TRAINED, *FITTED)
OPTION = {"slice": "slice", "low-rank": "rank", "prune": "keep"}  # of a head
INT8 = ("also", "only", "no")
PAPERS_DIMS, PAPERS_SIZES = 768, (576, 480, 384, 192, 64, 32)


def default_sizes(dims: int, parts: int = 1) -> list[int]:
    """The paper's six sizes in proportion to a full embedding of ``dims``, multiples of ``parts``, largest first."""
    found = {max(1, round(size * dims / PAPERS_DIMS / parts)) * parts for size in PAPERS_SIZES}
    return sorted((size for size in found if size < dims), reverse=True)


@dataclass(frozen=True)
class Job:
    """One training. ``larger``: the job whose weights it prunes, for which a fifth of the epochs is enough."""

    method: str
    dims: int
    int8: bool
    name: str
    spec: ModelSpec
    larger: Job | None = None


def jobs_of(spec: ModelSpec, methods: Sequence[str], sizes: Sequence[int], int8: str) -> list[Job]:
    """The trainings in order: every job after the one that it begins with. ``full`` is among them where pruning or a
    method that is fitted to the full embedding needs it.

    Raises UserError: unknown words, a size that the embedding does not have, a model that is compressed already.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if int8 not in INT8:
        raise unknown("--int8", int8, INT8)
    if asked := [name for name in ("slice", "rank", "keep", "int8") if spec.head.get(name)]:
        raise UserError(f"{', '.join(asked)}: the command compresses the model itself; leave these options out")
    with torch.device("meta"):
        net = spec.build()
    parts = len(net.branch_dims) if spec.head.get("head") == "streams" else 1
    for size in sizes:
        if not 1 <= size < net.dims or size % parts:
            multiples = f", multiples of {parts}" if parts > 1 else ""
            raise UserError(f"--dims {size}: the full embedding of {spec.label} has {net.dims} dimensions; allowed: 1 to "
                            f"{net.dims - 1}{multiples}")
    sizes = sorted(set(sizes), reverse=True)
    found: list[Job] = []
    for quantised in {"also": (False, True), "only": (True,), "no": (False,)}[int8]:
        def job(method: str, size: int, larger: Job | None = None, quantised: bool = quantised) -> Job:
            head = {**spec.head, **({OPTION[method]: size} if method in OPTION else {}),
                    **({"int8": True} if quantised else {})}
            words = [spec.label, *([f"{method.replace('-', '')}{size}"] if method in OPTION else []),
                     *(["int8"] if quantised else [])]
            name = "-".join(words)
            return Job(method, size, quantised, name, replace(spec, head=head, label=name), larger)

        full = job("full", net.dims)
        if {"full", "prune"} & set(methods) or (set(FITTED) & set(methods) and not quantised):
            found.append(full)
        for method in TRAINED[1:]:
            last = full
            for size in sizes if method in methods else ():
                last = job(method, size, last if method == "prune" else None)
                found.append(last)
    return found


def group_of(spec: ModelSpec) -> str:
    """The folder of a model's compressed results, in that of the dataset."""
    return f"{spec.label}-compress"


def train(
    spec: ModelSpec,
    dataset: str,
    recipe: Recipe,
    out: str | Path,
    *,
    methods: Sequence[str] = METHODS,
    sizes: Sequence[int] | None = None,
    int8: str = "also",
    seed: int = 0,
    **options: Any,
) -> list[tuple[Job, Path, dict[str, Any]]]:
    """Train what the methods ask for, one after the other, and return each with its result's path and value.

    ``options`` are those of ``train.retrain``: root, device, workers, cache, init, overwrite. Results lie in
    ``<out>/<dataset>/<model>-compress/``. Raises what ``retrain`` raises, ``Preempted`` among it: SIGTERM came and the
    state is saved.
    """
    with torch.device("meta"):
        dims = spec.build().dims
    parts = 2 if spec.head.get("head") == "streams" else 1
    jobs = jobs_of(spec, methods, default_sizes(dims, parts) if sizes is None else sizes, int8)
    folder = Path(out) / folder_name(dataset) / group_of(spec)
    overwrite, init = options.pop("overwrite", False), options.pop("init", "scratch")
    found = []
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}, seed {seed}: {number} of {len(jobs)}")
        forget_peak_memory()
        larger = folder / f"{job.larger.name}-s{seed}.safetensors" if job.larger else None
        path, result = retrain(
            job.spec, dataset, step_of_pruning(recipe) if larger else recipe, out, seed=seed, name=job.name,
            group=group_of(spec), init="scratch" if larger else init, prune=larger, resume=not overwrite,
            overwrite=overwrite, **options,
        )
        found.append((job, path, result))
    return found

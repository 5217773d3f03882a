"""Embeddings of fewer bytes, side by side: each method of the compression study trained, or measured, at each size.

McDermott, "Embedding Compression for Efficient Re-Identification" (2024). What a method is stands in
``autoreid.compression``; here is which networks a question asks for, in which order they are trained, and what became of
them. Every training is one of ``train.retrain`` and resumes by itself; a finished one that answers the same question is
not made again.
"""

from __future__ import annotations

import functools
import glob
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoreid import data, parallel
from autoreid.compression import PCA, ProductQuantiser, bytes_of, check_axes
from autoreid.errors import UserError, unknown
from autoreid.evaluate import Evaluation, extract
from autoreid.neighbours import dequantise, import_faiss, measure_search, quantise, scale_of
from autoreid.network import ModelSpec, check_same, load_weights, wrote
from autoreid.options import read_json, require
from autoreid.pretrained import sha256_of
from autoreid.recipe import Recipe, step_of_pruning
from autoreid.runs import (
    Preempted,
    Run,
    asked_to_stop,
    environment,
    folder_name,
    forget_peak_memory,
    say,
    write_json,
)
from autoreid.train import TESTED, again, check_start, measure, retrain

TRAINED = ("full", "slice", "low-rank", "prune")
FITTED = ("pca", "pq", "int8", "cut")  # to the embeddings of a trained network, without training
METHODS = (*TRAINED, *FITTED)
USUAL = {True: ("full", "slice", "low-rank", "prune", "pca", "pq", "int8"), False: FITTED}  # a model; its weights
OPTION = {"slice": "slice", "low-rank": "rank", "prune": "keep"}  # of a head
INT8 = ("also", "only", "no")
PAPERS_DIMS, PAPERS_SIZES = 768, (576, 480, 384, 192, 64, 32)
NEAREST = 10  # that a search is timed for
NOISE = 0.1  # of a dimension's standard deviation, added to what is repeated in a larger gallery


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
    """The trainings in order: every job after the one that it begins with. The full embedding is among them where pruning
    begins with it or a method is fitted to it.

    Raises UserError: unknown words, a size that the embedding does not have, a model that is compressed already.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if not methods:
        raise UserError(f"no method is given; known: {', '.join(METHODS)}")
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
    fitted = int8 == "only" and set(FITTED) & set(methods)
    found: list[Job] = [Job("full", net.dims, False, spec.label, spec)] if fitted else []
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
    methods: Sequence[str] = USUAL[True],
    sizes: Sequence[int] | None = None,
    int8: str = "also",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Train what the methods ask for, one after the other, then fit the others to the full embedding; the folder of the
    results, ``<out>/<dataset>/<model>-compress``.

    ``options`` are those of ``train.retrain``: root, device, workers, cache, init, overwrite. Raises what ``retrain``
    raises, ``Preempted`` among it: SIGTERM came and the state is saved.
    """
    with torch.device("meta"):
        dims = spec.build().dims
    parts = 2 if spec.head.get("head") == "streams" else 1
    sizes = default_sizes(dims, parts) if sizes is None else sizes
    jobs = jobs_of(spec, methods, sizes, int8)
    folder = Path(out) / folder_name(dataset) / group_of(spec)
    overwrite, init, root = options.pop("overwrite", False), options.pop("init", "scratch"), options.get("root")
    # Before anything is trained or taken away.
    splits = data.load(dataset, root)
    if "pca" in methods:
        check_axes(max(sizes, default=1), dims, len(splits.train))
    check_starts(jobs, init)
    start = check_start(jobs[0].spec if jobs else spec, recipe, init)
    asked = {"dataset": splits.name, **fingerprints(splits), "input": list(recipe.input), "views": recipe.views,
             "recipe": recipe.key(), **start}
    check_folder(folder, spec.label, jobs, asked, recipe, seed, overwrite)
    if overwrite:  # all of it now: started again without the option, the command trains what is then missing
        clear(folder, spec.label, jobs, seed)
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}, seed {seed}: {number} of {len(jobs)}")
        forget_peak_memory()
        larger = folder / f"{job.larger.name}-s{seed}.safetensors" if job.larger else None
        retrain(
            job.spec, dataset, step_of_pruning(recipe) if larger else recipe, out, seed=seed, name=job.name,
            group=group_of(spec), init="scratch" if larger else init, prune=larger, resume=True, **options,
        )
    fitted = [method for method in methods if method in FITTED]
    full = folder / f"{spec.label}-s{seed}.safetensors"
    if fitted and not full.is_file():
        say(f"{', '.join(fitted)} left out: {full} is gone; --overwrite trains it anew")
    elif fitted:
        fit_all(full, dataset, folder, methods=fitted, sizes=sizes, int8=int8, root=root,
                device=options.get("device", "cpu"), views=recipe.views)
    return folder


def fingerprints(splits: data.Splits) -> dict[str, str]:
    """Of the images that are evaluated on and of those trained on, by the names that results have for them."""
    return {"fingerprint": data.fingerprint(splits, TESTED), "train_fingerprint": data.fingerprint(splits, ("train",))}


def check_starts(jobs: Sequence[Job], init: str) -> None:
    """Raises UserError where ``init`` is a file of ours, but not the weights of every network that is to begin with it."""
    misfits: list[tuple[str, UserError]] = []
    begun = [job for job in jobs if job.larger is None] if wrote(init) else []
    for job in begun:
        with torch.device("meta"):
            net = job.spec.build()
        try:
            check_same(net, init)
        except UserError as fault:
            misfits.append((job.name, fault))
    if misfits and len(misfits) == len(begun):
        raise misfits[0][1]
    if misfits:
        raise UserError(f"--init {init}: {', '.join(name for name, _ in misfits)} cannot begin with these weights, having "
                        "tensors of other shapes or more of them; leave these out by --methods and --int8, or give the "
                        "file in the model's place to compress it without training")


def check_folder(
    folder: Path, label: str, jobs: Sequence[Job], asked: Mapping[str, Any], recipe: Recipe, seed: int, overwrite: bool
) -> None:
    """Raises UserError where the runs and results in ``folder`` are not of the question that is asked: those that will be
    gone on with, and those of other seeds and methods, which :func:`summary` sets beside them."""
    for job in () if overwrite else jobs:
        run = folder / f"{job.name}-s{seed}"
        if not (run / "config.json").is_file():
            continue
        before = read_json(run / "config.json", "run configuration")
        now, then = asdict(step_of_pruning(recipe) if job.larger else recipe), dict(before.get("recipe") or {})
        if job.larger is None:
            for key in ("init", "init_file", "init_sha256"):
                now[key], then[key] = asked.get(key), before.get(key)
        for key, value in json.loads(json.dumps(now)).items():
            if then.get(key) != value:
                raise UserError(f"{run} was started with {key}={then.get(key)}, now {key}={value}: give the same options, "
                                "--overwrite to start anew, or write elsewhere with --out")
        if job.larger:
            source = {"init_file": before.get("init_file")}
            _one_chain([Found("prune", job.dims, "", seed, run.name, source)], {(job.dims, ""): job.larger.name})
            weights = folder / f"{job.larger.name}-s{seed}.safetensors"
            if weights.is_file() and sha256_of(weights) != before.get("init_sha256"):
                raise UserError(f"{run} was pruned from other weights than {weights.name} there: --overwrite trains both "
                                "anew; or write elsewhere with --out")
    anew = {f"{job.name}-s{seed}" for job in jobs} if overwrite else set()
    found = [f for f in records_of(folder, label)
             if f.name not in anew and not (overwrite and f.seed == seed and f.method in FITTED)]
    _one_question(folder, [*found, Found("full", 0, "", seed, "", dict(asked))])
    _one_chain(found, {(job.dims, "int8" if job.int8 else "float32"): job.larger.name for job in jobs if job.larger})


def clear(folder: Path, label: str, jobs: Sequence[Job], seed: int) -> None:
    """Take away the runs and results of these trainings, and of this seed what is fitted to the full embedding."""
    fitted = [folder / f"{f.name}.json" for f in records_of(folder, label) if f.seed == seed and f.method in FITTED]
    parallel.wait()  # until every process has looked
    if parallel.is_first():
        for path in fitted:
            path.unlink(missing_ok=True)
        for job in reversed(jobs):  # none stays whose beginning is gone
            name = f"{job.name}-s{seed}"
            Run.clear(folder / name, [folder / f"{name}.json", folder / f"{name}.safetensors"])
    parallel.wait()


# ---------------------------------------------------------------------------------------- without training
class Fitted(NamedTuple):
    """What a method without training makes of query and gallery."""

    name: str
    embedding: dict[str, Any]  # dims, dtype, bytes of one image; shared_bytes of the whole gallery
    query: Tensor
    gallery: Tensor  # as decoded


def names_of_fits(full: int, methods: Sequence[str], sizes: Sequence[int], int8: str) -> list[str]:
    """What the methods without training are to make of an embedding of ``full`` dimensions, by the names of the records.
    A product quantiser has at most half as many bytes."""
    found = ["after-int8"] if "int8" in methods and int8 != "no" else []
    for size in sorted(set(sizes), reverse=True):
        for method in ("pca", "cut"):
            if method in methods:
                found += [f"{method}{size}"] * (int8 != "only") + [f"{method}{size}-int8"] * (int8 != "no")
        if "pq" in methods and size <= max(1, full // 2):
            found.append(f"pq{size}")
    return found


def fits_of(train: Tensor, query: Tensor, gallery: Tensor, names: Sequence[str]) -> Iterator[Fitted]:
    """PCA, the first dimensions alone ("cut"), int8 codes and product quantisers, all fitted to training embeddings N x D;
    ``names`` as of :func:`names_of_fits`.

    int8 has one scale, the largest absolute value of the training embeddings over 127: larger ones are clipped.
    """
    split = {name: re.split(r"(\d+)", name.removesuffix("-int8")) for name in names}
    largest = max((int(parts[1]) for parts in split.values() if parts[0] == "pca"), default=0)
    pca = PCA.fit(train, largest) if largest else None
    for name, (method, *rest) in split.items():
        size = int(rest[0]) if rest else train.shape[1]
        if method == "pq":
            coder = ProductQuantiser.fit(train, size)
            decoded = coder.decode(coder.codes(gallery)).to(gallery.device)
            stored = {"dims": train.shape[1], "dtype": "pq", "bytes": size, "shared_bytes": coder.shared_bytes}
            yield Fitted(name, stored, query, decoded)
            continue
        here, asking, answering = train, query, gallery
        if method == "pca" and pca is not None:
            axes = PCA(pca.mean, pca.axes[:, :size].contiguous())
            here, asking, answering = axes(train), axes(query), axes(gallery)
        elif method == "cut":
            here, asking, answering = train[:, :size], query[:, :size], gallery[:, :size]
        dtype = "int8" if name.endswith("-int8") else "float32"
        if dtype == "int8":
            scale = scale_of(here)
            asking, answering = (dequantise(quantise(x, scale), scale) for x in (asking, answering))
        stored = {"dims": size, "dtype": dtype, "bytes": bytes_of(size, dtype), "shared_bytes": 4 if dtype == "int8" else 0}
        yield Fitted(name, stored, asking, answering)


def fit_all(
    weights: str | Path,
    dataset: str,
    folder: Path,
    *,
    methods: Sequence[str] = FITTED,
    sizes: Sequence[int] | None = None,
    int8: str = "also",
    root: str | None = None,
    device: str = "cpu",
    views: int = 1,
    overwrite: bool = False,
) -> None:
    """Compress a trained network's embeddings without training: a record of each in ``folder``, and one of the network as
    it is where there is none. What is there already, of the same weights and images, is not made again; each record is
    written as soon as it is made, and SIGTERM stops between two (``Preempted``).

    Everything is fitted to the embeddings of ``dataset``'s training images. Raises UserError: unknown methods or sizes;
    records of other weights or images in ``folder``, unless they are of a network that was trained there before.
    """
    if not methods:
        raise UserError(f"no method is given; known: {', '.join(FITTED)}")
    for method in methods:
        if method not in FITTED:
            raise UserError(f"--methods {method}: trained weights are compressed without training; allowed: "
                            f"{', '.join(FITTED)}; `autoreid compress MODEL` trains the others")
    if int8 not in INT8:
        raise unknown("--int8", int8, INT8)
    weights = Path(weights)
    net, header = load_weights(weights)
    name, seed = header.get("name", weights.stem), header["seed"]
    sizes = default_sizes(net.dims) if sizes is None else sizes
    for k in sizes:
        require(1 <= k < net.dims, "--dims", k, f"1 to {net.dims - 1}: {weights.name} has embeddings of {net.dims}")
    splits = data.load(dataset, root)
    if "pca" in methods:
        check_axes(max(sizes, default=1), net.dims, len(splits.train))
    names = names_of_fits(net.dims, methods, sizes, int8)
    if "pq" in methods and (wide := [str(k) for k in sizes if f"pq{k}" not in names]):
        say(f"pq of {', '.join(wide)} bytes left out: a product quantiser of {net.dims} dimensions has at most "
            f"{max(1, net.dims // 2)} here")
    prints = fingerprints(splits)
    origin = {"file": weights.name, "sha256": sha256_of(weights), "fitted_on": len(splits.train),
              "train_fingerprint": prints["train_fingerprint"]}
    own = weights.parent == folder and weights.with_suffix(".json").is_file()  # trained there
    there = {path: record for path in sorted(folder.glob(f"{glob.escape(name)}*-s{seed}.json" if own else "*.json"))
             if "made_from" in (record := read_json(path, "result"))}
    stale = [path for path, record in there.items()
             if any(record["made_from"].get(key) != origin[key] for key in ("sha256", "train_fingerprint"))
             or (record["fingerprint"], record["views"]) != (prints["fingerprint"], views)]
    if stale and not (own or overwrite):
        raise UserError(f"{stale[0]} is of other weights than {weights}, or of another dataset than is asked for: "
                        "--overwrite replaces what is there, or write elsewhere with --out")
    wanted = {folder / f"{name}-{fit}-s{seed}.json": fit for fit in names}
    whole_file = folder / f"{name}-s{seed}.json"
    if stale:
        say(f"{', '.join(path.stem for path in stale)} taken away: made of other weights than {weights} or other images")
    if overwrite:
        stale += [path for path in there if path not in stale and (path in wanted or path == whole_file)]
    todo = {fit: path for path, fit in wanted.items() if path not in there or path in stale}
    if not todo and (own or (whole_file in there and whole_file not in stale)):
        say(f"{', '.join(methods)} of {weights.name}: there already")
        return
    parallel.wait()  # until every process has looked
    if parallel.is_first():
        for path in stale:
            path.unlink(missing_ok=True)
    size = (int(header["input"][0]), int(header["input"][1]))
    net.to(device)
    whole, extracted = measure(net, ModelSpec.from_dict(header["model"]), name, splits, size, device=device,
                               how=Evaluation(views=views))
    say(f"embeddings of {len(splits.train)} training images")
    train_features = extract(net, splits.train, size, device, views=views).to(extracted.query.device)
    whole |= again(weights, header, splits) | {"model": name}
    if not own and parallel.is_first():
        write_json(whole_file, {**whole, "made_from": origin})
    for fitted in fits_of(train_features, extracted.query, extracted.gallery, list(todo)):
        metrics = replace(extracted, query=fitted.query, gallery=fitted.gallery).metrics()
        figures = {key: value for key, value in metrics.to_dict().items() if key not in ("total", "scored", "protocol")}
        say(f"{fitted.name}: mAP {100 * metrics.mAP:.1f} %")
        if parallel.is_first():
            write_json(todo[fitted.name], {**whole, "model": f"{name}-{fitted.name}", "embedding": fitted.embedding,
                                           **figures, "made_from": origin})
        if asked_to_stop():
            raise Preempted
    parallel.wait()  # until all is written that will be read


# ---------------------------------------------------------------------------------------- side by side
METHOD_OF = {"": "full", "slice": "slice", "lowrank": "low-rank", "prune": "prune", "pca": "pca", "pq": "pq",
             "after": "int8", "cut": "cut"}


class Found(NamedTuple):
    """A record in the folder. ``size``: dimensions, of a product quantiser bytes."""

    method: str
    size: int
    dtype: str
    seed: int
    name: str  # of the file, without .json
    record: dict[str, Any]


def records_of(folder: Path, label: str) -> list[Found]:
    """The records of a model in its folder, by the names of the files."""
    pattern = re.compile(re.escape(label) + r"(?:-(slice|lowrank|prune|pca|pq|after|cut)(\d*))?(?:-int8)?-s(\d+)\.json")
    found = []
    for path in sorted(folder.glob("*.json")):
        if match := pattern.fullmatch(path.name):
            record = read_json(path, "result")
            method, embedding = METHOD_OF[match[1] or ""], record["embedding"]
            size = embedding["bytes"] if method == "pq" else embedding["dims"]
            found.append(Found(method, size, embedding["dtype"], int(match[3]), path.stem, record))
    return found


def replaced(folder: Path, found: Sequence[Found]) -> list[Found]:
    """Those that were pruned from weights, or fitted to weights, that are no longer the ones in the folder; and what was
    pruned from these. Where the weights are not there the record is believed."""
    by_name, digest = {f.name: f.record for f in found}, functools.cache(sha256_of)

    def gone(name: str) -> bool:
        record = by_name[name]
        made = record.get("made_from") or {"file": record.get("init_file"), "sha256": record.get("init_sha256")}
        if made["file"] is None or not ("made_from" in record or record.get("init") == "pruned"):
            return False
        weights = folder / made["file"]
        if weights.is_file() and digest(weights) != made["sha256"]:
            return True
        return weights.stem != name and weights.stem in by_name and gone(weights.stem)

    return [f for f in found if gone(f.name)]


def _one_question(folder: Path, found: Sequence[Found]) -> None:
    """Raises UserError where the records differ in what makes them comparable. A pruned network's recipe and start are
    its chain's."""
    chains = ("recipe", "init", "init_sha256")
    for field in ("dataset", "fingerprint", "train_fingerprint", "protocol", "input", "views", *chains):
        values = sorted({str(f.record[field]) for f in found
                         if field in f.record and not (f.method == "prune" and field in chains)})
        if len(values) > 1:
            raise UserError(f"{folder}: results of {field} {' and '.join(values)} would stand side by side; write "
                            "elsewhere with --out, or take the old ones away (--overwrite does, of what --methods, --dims "
                            "and --seed ask for)")


def _one_chain(found: Sequence[Found], asked: Mapping[tuple[int, str], str]) -> None:
    """Raises UserError where networks of a size were pruned from another than is ``asked``, or than another seed's was."""
    sources = dict(asked)
    for f in found:
        if f.method == "prune" and (file := f.record.get("init_file")):
            source = re.sub(r"-s\d+\.safetensors$", "", file)
            wanted = sources.setdefault((f.size, f.dtype), source)
            if source != wanted:
                other = "asked is" if (f.size, f.dtype) in asked else "another seed's was"
                raise UserError(f"{f.name} was pruned from {source} there, {other} from {wanted}: pruning goes through the "
                                "sizes one by one; give the first run's --dims, or another --out")


def summary(folder: Path, label: str, dataset: str) -> dict[str, Any]:
    """The records of a folder side by side: a row for each method, size and type over the seeds that are there.

    Rows of method, dims, dtype, bytes, ratio (to the full float32 embedding), seeds, mAP and rank1 (the mean, and the
    sample standard deviation where there are two seeds), change (of mAP against the full float32 one, the mean over the
    seeds that both have), epochs (with those of the networks that a pruned one began with). Left out, and said, is what
    was made of weights that are no more. Raises UserError: no record, or records that are not of one question.
    """
    there = records_of(folder, label)
    if not there:
        raise UserError(f"{folder} holds no results of {label}: `autoreid compress {label} --dataset {dataset}` makes them")
    left_out = [f.name for f in replaced(folder, there)]
    if left_out:
        say(f"{', '.join(left_out)} left out: made of other weights than now lie beside them; make them anew with "
            "--overwrite and their --methods, --dims and --seed, or take the files away")
    there = [f for f in there if f.name not in left_out]
    _one_question(folder, there)
    _one_chain(there, {})
    records = [f.record for f in there]
    recipes = {f.record["recipe"] for f in there if f.method != "prune"}
    found: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for f in there:
        found.setdefault((f.method, f.size, f.dtype), {})[f.seed] = f.record
    fulls = {dtype: of_seed for (method, _, dtype), of_seed in found.items() if method == "full"}
    whole = fulls.get("float32", {})
    full = next((r["embedding"]["dims"] for of_seed in fulls.values() for r in of_seed.values()), None)
    rows = []
    for (method, _, dtype), of_seed in sorted(found.items(), key=lambda item: _place(*item[0])):
        first = next(iter(of_seed.values()))
        common = [of_seed[s]["mAP"] - whole[s]["mAP"] for s in of_seed if s in whole]
        rows.append({
            "method": method, "dims": first["embedding"]["dims"], "dtype": dtype, "bytes": first["embedding"]["bytes"],
            "ratio": bytes_of(full) / first["embedding"]["bytes"] if full else None, "seeds": sorted(of_seed),
            "mAP": _over([r["mAP"] for r in of_seed.values()]), "rank1": _over([r["cmc"]["1"] for r in of_seed.values()]),
            "change": sum(common) / len(common) if common else None,
            "epochs": ((first.get("train") or {}).get("epochs") or 0) + (first.get("init_epochs") or 0) or None,
        })
    one = records[0]
    return {"model": label, "dataset": one["dataset"], "protocol": one["protocol"], "recipe": next(iter(recipes), None),
            "input": one["input"], "queries": one["queries"], "rows": rows, "left_out": left_out, "search": [],
            "environment": environment()}


def _place(method: str, size: int, dtype: str) -> tuple[int, int, int]:
    return METHODS.index(method), dtype == "int8", -size


def _over(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def describe(found: Mapping[str, Any]) -> str:
    """The table of :func:`summary` and that of the searches, for people."""
    lines = [f"{'method':9} {'dims':>5} {'type':8} {'bytes':>6} {'ratio':>7}  {'mAP %':>12}  {'rank-1 %':>12} "
             f"{'change':>7} {'epochs':>6}  seeds"]
    for row in found["rows"]:
        change = "-" if row["change"] is None else f"{round(100 * row['change'], 1) + 0.0:+.1f}"
        times = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        lines.append(
            f"{row['method']:9} {row['dims']:5} {row['dtype']:8} {row['bytes']:6} {times:>7}  {_spread(row['mAP']):>12}  "
            f"{_spread(row['rank1']):>12} {change:>7} {row['epochs'] or '-':>6}  {','.join(map(str, row['seeds']))}"
        )
    lines.append("bytes of one image's embedding; an int8 gallery keeps 4 bytes of scale besides, a pq one its centroids; "
                 "ratio: to the full float32 embedding")
    for search in found["search"]:
        tiled = f", repeated from {search['images']} with noise" if search["repeated"] else ""
        lines += ["", f"the {search['nearest']} nearest of {search['gallery']:,} embeddings of {search['embedding']}, "
                  f"{search['dims']} dimensions{tiled}; {search['queries']} queries, {search['threads']} thread(s)",
                  f"{'engine':12} {'bytes':>14} {'built in':>10} {'one query':>11} {'of a batch':>11} {'recall':>7}"]
        lines += [f"{row['engine']:12} {row['bytes']:14,} {row['build_seconds']:8.2f} s {row['ms_per_query']['1']:8.3f} ms "
                  f"{row['ms_per_query']['all']:8.3f} ms {row['recall']:7.3f}" for row in search["rows"]]
    return "\n".join(lines)


def _spread(value: Mapping[str, float | None]) -> str:
    assert value["mean"] is not None
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * value['std']:.1f}" if value["std"] is not None else "")


# ---------------------------------------------------------------------------------------- search
def search(
    weights: Path, dataset: str, *, gallery: int | None = None, root: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """What it takes to find the nearest of the dataset's gallery among a network's embeddings: exact in float32 and in
    int8, and by faiss where it is installed (``neighbours.measure_search``).

    ``gallery``: as many embeddings as that, the dataset's repeated with a little noise. int8 by the network's own scale;
    where it has none, by that of training embeddings.
    """
    check_gallery(dataset, root, gallery)
    net, header = load_weights(weights)
    splits = data.load(dataset, root)
    size = (int(header["input"][0]), int(header["input"][1]))
    net.to(device)
    query, answers = (extract(net, samples, size, device) for samples in (splits.query, splits.gallery))
    scale = net.scale or scale_of(extract(net, splits.train, size, device))
    images, count = len(answers), gallery or len(answers)
    engines = ["exact", "int8"]
    try:
        import_faiss()
        engines += ["faiss-flat", "faiss-sq8", "faiss-hnsw"]
    except UserError as fault:
        say(f"without faiss: {fault}")
    rows = measure_search(engines, query, enlarged_gallery(answers, count), min(NEAREST, count), scale)
    return {"embedding": weights.stem, "sha256": sha256_of(weights), "dims": net.dims, "queries": len(query),
            "images": images, "gallery": count, "repeated": count > images,
            "noise": NOISE if count > images else 0.0, "nearest": min(NEAREST, count),
            "threads": torch.get_num_threads(), "rows": rows}


def check_gallery(dataset: str, root: str | None, count: int | None) -> None:
    """Raises UserError: a gallery smaller than the dataset's."""
    if count is not None and count < (images := len(data.load(dataset, root, parts=("gallery",)).gallery)):
        raise UserError(f"--gallery {count}: {dataset} has {images} gallery images; allowed: {images} or more")


def earlier_searches(folder: Path, made: Sequence[Mapping[str, Any]], weights: Path) -> list[dict[str, Any]]:
    """The searches in the folder's ``compress.json`` that were not made again: of another gallery size or embedding, if
    the weights in the folder ``weights`` are still the same or gone."""

    def what(search: Mapping[str, Any]) -> tuple[str, int]:
        return re.sub(r"-s\d+$", "", search["embedding"]), search["gallery"]

    path, now = folder / "compress.json", {what(search) for search in made}
    before = read_json(path, "list of results")["search"] if path.is_file() else []
    return [search for search in before if what(search) not in now
            and (not (file := weights / f"{search['embedding']}.safetensors").is_file()
                 or sha256_of(file) == search.get("sha256"))]


def enlarged_gallery(features: Tensor, count: int) -> Tensor:
    """``count`` x D: the embeddings, then the same again with Gaussian noise of ``NOISE`` standard deviations of each
    dimension. Always the same."""
    more = count - len(features)
    if more <= 0:
        return features
    generator = torch.Generator().manual_seed(0)
    again = features[torch.arange(more) % len(features)]
    return torch.cat([features, again + NOISE * features.std(0) * torch.randn(again.shape, generator=generator)])


def smallest_weights(folder: Path, label: str, seed: int) -> list[Path]:
    """The weights whose search is timed: of the full embedding and of the smallest trained one, in int8 where there are
    any; [] where none are left."""
    by_size: dict[int, Path] = {}
    pattern = re.compile(re.escape(label) + rf"(?:-(?:slice|lowrank|prune)(\d+))?(-int8)?-s{seed}\.safetensors")
    for path in sorted(folder.glob(f"{glob.escape(label)}*.safetensors")):
        if match := pattern.fullmatch(path.name):
            size = int(match[1] or 0)
            if size not in by_size or match[2]:
                by_size[size] = path
    smaller = [size for size in by_size if size]
    return [by_size[size] for size in (0, min(smaller, default=0)) if size in by_size][: 2 if smaller else 1]

"""Embeddings of fewer bytes, side by side: each method of the compression study trained, or measured, at each size.

McDermott, "Embedding Compression for Efficient Re-Identification" (2024). What a method is stands in
``autoreid.compression``; here is which networks a question asks for, in which order they are trained, and what became of
them. Every training is one of ``train.retrain`` and resumes by itself; a finished one that answers the same question is
not made again.
"""

from __future__ import annotations

import glob
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoreid import data, parallel
from autoreid.compression import PCA, ProductQuantiser, bytes_of, check_axes
from autoreid.errors import UserError, unknown
from autoreid.evaluate import Evaluation, extract
from autoreid.neighbours import dequantise, import_faiss, measure_search, quantise, scale_of
from autoreid.network import ModelSpec, load_weights
from autoreid.options import read_json, require
from autoreid.pretrained import sha256_of
from autoreid.recipe import Recipe, step_of_pruning
from autoreid.runs import environment, folder_name, forget_peak_memory, say, write_json
from autoreid.train import again, measure, retrain

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
    if "pca" in methods:  # before anything is trained
        check_axes(max(sizes, default=1), dims, len(data.load(dataset, options.get("root"), parts=("train",)).train))
    folder = Path(out) / folder_name(dataset) / group_of(spec)
    overwrite, init = options.pop("overwrite", False), options.pop("init", "scratch")
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}, seed {seed}: {number} of {len(jobs)}")
        forget_peak_memory()
        larger = folder / f"{job.larger.name}-s{seed}.safetensors" if job.larger else None
        retrain(
            job.spec, dataset, step_of_pruning(recipe) if larger else recipe, out, seed=seed, name=job.name,
            group=group_of(spec), init="scratch" if larger else init, prune=larger, resume=not overwrite,
            overwrite=overwrite, **options,
        )
    fitted = [method for method in methods if method in FITTED]
    full = folder / f"{spec.label}-s{seed}.safetensors"
    if fitted and not full.is_file():
        say(f"{', '.join(fitted)} left out: {full} is gone; --overwrite trains it anew")
    elif fitted:
        fit_all(full, dataset, folder, methods=fitted, sizes=sizes, int8=int8,
                root=options.get("root"), device=options.get("device", "cpu"), views=recipe.views, overwrite=overwrite)
    return folder


# ---------------------------------------------------------------------------------------- without training
class Fitted(NamedTuple):
    """What a method without training makes of query and gallery."""

    name: str
    embedding: dict[str, Any]  # dims, dtype, bytes of one image; shared_bytes of the whole gallery
    query: Tensor
    gallery: Tensor  # as decoded


def fits_of(
    train: Tensor, query: Tensor, gallery: Tensor, methods: Sequence[str], sizes: Sequence[int], int8: str
) -> Iterator[Fitted]:
    """PCA, the first dimensions alone ("cut"), int8 codes and product quantisers, all fitted to training embeddings N x D.

    int8 has one scale, the largest absolute value of the training embeddings over 127: larger ones are clipped. PQ has as
    many bytes as ``sizes`` say, up to half of the dimensions.
    """
    full = train.shape[1]

    def both(name: str, here: Tensor, asking: Tensor, answering: Tensor, floats: bool = True) -> Iterator[Fitted]:
        dims = here.shape[1]
        if floats and int8 != "only":
            stored = {"dims": dims, "dtype": "float32", "bytes": bytes_of(dims), "shared_bytes": 0}
            yield Fitted(name, stored, asking, answering)
        if int8 != "no":
            scale = scale_of(here)
            coded = [dequantise(quantise(x, scale), scale) for x in (asking, answering)]
            stored = {"dims": dims, "dtype": "int8", "bytes": bytes_of(dims, "int8"), "shared_bytes": 4}
            yield Fitted(f"{name}-int8" if floats else name, stored, *coded)

    if "int8" in methods:
        yield from both("after-int8", train, query, gallery, floats=False)
    for size in sorted(sizes, reverse=True):
        if "pca" in methods:
            pca = PCA.fit(train, size)
            yield from both(f"pca{size}", pca(train), pca(query), pca(gallery))
        if "cut" in methods:
            yield from both(f"cut{size}", train[:, :size], query[:, :size], gallery[:, :size])
        if "pq" in methods and size <= max(1, full // 2):
            coder = ProductQuantiser.fit(train, size)
            decoded = coder.decode(coder.codes(gallery)).to(gallery.device)
            stored = {"dims": full, "dtype": "pq", "bytes": size, "shared_bytes": coder.shared_bytes}
            yield Fitted(f"pq{size}", stored, query, decoded)


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
    it is where there is none. What is there already, of the same weights, is not made again.

    Everything is fitted to the embeddings of ``dataset``'s training images. Raises UserError: unknown methods or sizes.
    """
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
    origin = {"file": weights.name, "sha256": sha256_of(weights), "methods": sorted(methods), "sizes": sorted(sizes),
              "int8": int8, "views": views}
    list_of = folder / f"{name}-s{seed}-fitted.json"
    before = read_json(list_of, "list") if list_of.is_file() else {"of": {}, "files": []}
    if not overwrite and before["of"] == origin and all((folder / file).is_file() for file in before["files"]):
        say(f"{', '.join(methods)} of {weights.name}: there already")
        return
    stale = before["of"].get("sha256") != origin["sha256"]
    splits = data.load(dataset, root)
    size = (int(header["input"][0]), int(header["input"][1]))
    how = Evaluation(views=views)
    net.to(device)
    whole, extracted = measure(net, ModelSpec.from_dict(header["model"]), name, splits, size, device=device, how=how)
    say(f"embeddings of {len(splits.train)} training images")
    train_features = extract(net, splits.train, size, device, views=views).to(extracted.query.device)
    whole |= again(weights, header, splits) | {"model": name}
    trained_here = weights.parent == folder and weights.with_suffix(".json").is_file()
    records = {} if trained_here else {f"{name}-s{seed}.json": whole}
    for fitted in fits_of(train_features, extracted.query, extracted.gallery, methods, sizes, int8):
        metrics = replace(extracted, query=fitted.query, gallery=fitted.gallery).metrics()
        figures = {key: value for key, value in metrics.to_dict().items() if key not in ("total", "scored", "protocol")}
        say(f"{fitted.name}: mAP {100 * metrics.mAP:.1f} %")
        records[f"{name}-{fitted.name}-s{seed}.json"] = {
            **whole, "model": f"{name}-{fitted.name}", "embedding": fitted.embedding, **figures,
            "made_from": {"file": weights.name, "sha256": origin["sha256"], "fitted_on": len(train_features)},
        }
    if parallel.is_first():
        for file in before["files"] if stale else ():  # of weights that are no more
            (folder / file).unlink(missing_ok=True)
        for file, record in records.items():
            write_json(folder / file, record)
        write_json(list_of, {"of": origin, "files": sorted({*records, *(() if stale else before["files"])})})


# ---------------------------------------------------------------------------------------- side by side
METHOD_OF = {"": "full", "slice": "slice", "lowrank": "low-rank", "prune": "prune", "pca": "pca", "pq": "pq",
             "after": "int8", "cut": "cut"}


def summary(folder: Path, label: str, dataset: str) -> dict[str, Any]:
    """The records of a folder side by side: a row for each method, size and type over the seeds that are there.

    Rows of method, dims, dtype, bytes, ratio (to the full float32 embedding), seeds, mAP and rank1 (the mean, and the
    sample standard deviation where there are two seeds), change (of mAP against the full float32 one, the mean over the
    seeds that both have), epochs (with those of the networks that a pruned one began with). Raises UserError: no record,
    or records that are not of one question.
    """
    found: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    pattern = re.compile(re.escape(label) + r"(?:-(slice|lowrank|prune|pca|pq|after|cut)(\d*))?(?:-int8)?-s(\d+)\.json")
    for path in sorted(folder.glob("*.json")):
        if match := pattern.fullmatch(path.name):
            record = read_json(path, "result")
            method, embedding = METHOD_OF[match[1] or ""], record["embedding"]
            size = embedding["bytes"] if method == "pq" else embedding["dims"]
            found.setdefault((method, size, embedding["dtype"]), {})[int(match[3])] = record
    if not found:
        raise UserError(f"{folder} holds no results of {label}: `autoreid compress {label} --dataset {dataset}` makes them")
    records = [record for of_seed in found.values() for record in of_seed.values()]
    for field in ("dataset", "fingerprint", "protocol", "input", "views"):
        values = sorted({str(record.get(field)) for record in records})
        if len(values) > 1:
            raise UserError(f"{folder}: results of {field} {' and '.join(values)} lie side by side; make them anew with "
                            "--overwrite, or write elsewhere with --out")
    recipes = {record["recipe"] for (method, _, _), of_seed in found.items() for record in of_seed.values()
               if method != "prune"}
    if len(recipes) > 1:
        raise UserError(f"{folder}: results of the recipes {' and '.join(sorted(recipes))} lie side by side; make them "
                        "anew with --overwrite, or write elsewhere with --out")
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
            "input": one["input"], "queries": one["queries"], "rows": rows, "search": [], "environment": environment()}


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
    net, header = load_weights(weights)
    splits = data.load(dataset, root)
    size = (int(header["input"][0]), int(header["input"][1]))
    net.to(device)
    query, answers = (extract(net, samples, size, device) for samples in (splits.query, splits.gallery))
    scale = net.scale or scale_of(extract(net, splits.train, size, device))
    images, count = len(answers), gallery or len(answers)
    if count < images:
        raise UserError(f"--gallery {count}: {dataset} has {images} gallery images; allowed: {images} or more")
    engines = ["exact", "int8"]
    try:
        import_faiss()
        engines += ["faiss-flat", "faiss-sq8", "faiss-hnsw"]
    except UserError as fault:
        say(f"without faiss: {fault}")
    rows = measure_search(engines, query, enlarged_gallery(answers, count), min(NEAREST, count), scale)
    return {"embedding": weights.stem, "dims": net.dims, "queries": len(query), "images": images, "gallery": count,
            "repeated": count > images, "noise": NOISE if count > images else 0.0, "nearest": min(NEAREST, count),
            "threads": torch.get_num_threads(), "rows": rows}


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

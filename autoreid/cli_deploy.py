"""The commands of a trained network's life: spending less at run time, a gallery in use, a file to deploy.

As in ``cli``: every command parses, calls one function of the package and prints what it returns; torch is imported inside
the commands.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoreid.cli_parts import (
    Parser,
    cache_option,
    changes_of,
    counted,
    dataset_option,
    device_of,
    json_option,
    may_write,
    picture_options,
    preset_of,
    print_figures,
    propose,
    protocol_option,
    require_protocol,
    root_of,
    seed_option,
    set_threads,
    training_options,
    whole,
)
from autoreid.errors import UserError
from autoreid.recipe import RECIPES
from autoreid.runs import say

COMMANDS: tuple[str, ...] = ("anytime", "compress", "index", "find")
RESUMABLE: tuple[str, ...] = ("compress",)  # what SIGTERM stops with its state saved
JOINED: tuple[str, ...] = ("compress",)  # the same command goes on by itself


def add_commands(command: Callable[..., Parser]) -> None:
    """Add the parsers; ``command(name, text, example, run)`` makes one."""
    p = command("anytime", "stop a network with exits early: accuracy against computation, and streams of queries that "
                "keep to a budget", "autoreid anytime results/market/dare-r50-s0.safetensors --dataset market --root "
                "~/data --budget 1.5e9", anytime)
    p.add_argument("weights", metavar="WEIGHTS", help="a .safetensors file that retrain wrote with --set head=exits, or of "
                   "dare-r50 or dare-d201")
    dataset_option(p)
    protocol_option(p)
    p.add_argument("--budget", type=_budget, default="curve", metavar="N|curve", help="multiply-accumulates per query, on "
                   "average, as in 1.5e9; curve: nine budgets between the first exit and the last")
    p.add_argument("--confidence", metavar="NAME", help="what lets the easy queries leave first: distance, margin (needs "
                   "the gallery's identities) or random; default distance, of a curve all three")
    p.add_argument("--against", nargs="+", default=[], metavar="WEIGHTS", help="networks trained separately, run one after "
                   "another from the smallest: the ensemble that the exits are held against")
    p.add_argument("--timed", type=whole, default=100, metavar="N", help="queries to run one by one against the clock")
    p.add_argument("--out", metavar="DIR", default="results", help="where to write")
    seed_option(p)
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="replace what lies there of these weights")
    json_option(p)

    p = command("compress", "train embeddings of fewer bytes by each method, or compress those of trained weights: mAP "
                "against bytes; started again, it goes on", "autoreid compress vit-b16 --dataset market --root ~/data",
                compress)
    p.add_argument("model", metavar="MODEL|GENOTYPE.json|WEIGHTS", help="a name that `autoreid cost` lists or a searched "
                   "genotype, to be trained by each method; or a .safetensors file that retrain wrote, whose embeddings "
                   "are compressed without training")
    dataset_option(p)
    p.add_argument("--methods", default="full,slice,low-rank,prune,pca,pq", metavar="NAME,...", help="of full, slice, "
                   "low-rank, prune, pca and pq")
    p.add_argument("--dims", metavar="K,...", help="sizes of the embedding; default the paper's 576, 480, 384, 192, 64 and "
                   "32 of 768 in proportion to the model's")
    p.add_argument("--int8", default="also", metavar="NAME", help="also (float32 and int8), only or no")
    p.add_argument("--recipe", metavar="NAME|FILE", help=f"one of {', '.join(RECIPES)}, or a JSON file of its fields; "
                   "default: drawn for drawn data, default for all other")
    p.add_argument("--init", metavar="scratch|imagenet|FILE", default="scratch", help="what the trainings start from, as "
                   "in retrain")
    training_options(p)
    cache_option(p)
    p.add_argument("--out", metavar="DIR", default="results", help="where to write")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="train all anew, and replace what is there")
    json_option(p)

    _gallery_commands(command)


def compress(args: argparse.Namespace) -> None:
    from autoreid import compress as compression
    from autoreid import parallel
    from autoreid.network import find_model
    from autoreid.recipe import Recipe, find_recipe

    set_threads()
    changes = changes_of(args)
    for_recipe: dict[str, Any] = {key: changes.pop(key) for key in list(changes) if key in Recipe.__dataclass_fields__}
    spec = find_model(args.model, changes)
    found = compression.train(
        spec, args.dataset, find_recipe(args.recipe or preset_of(args.dataset), for_recipe), args.out,
        methods=args.methods.split(","), sizes=_sizes(args.dims), int8=args.int8, seed=args.seed, root=args.root,
        device=parallel.start(device_of(args.device)), workers=args.workers, cache=args.cache, init=args.init,
        overwrite=args.overwrite,
    )
    rows = [{"name": job.name, "method": job.method, **result["embedding"], "mAP": result["mAP"],
             "rank1": result["cmc"]["1"], "result": str(path)} for job, path, result in found]
    print_figures(args, rows, "\n".join(
        f"{row['name']:40} {row['dims']:5} {row['dtype']:8} {row['bytes']:6} B  mAP {100 * row['mAP']:5.1f} %  rank-1 "
        f"{100 * row['rank1']:5.1f} %" for row in rows))
    propose(f"autoreid compress {args.model} --dataset {args.dataset}{root_of(args)} --seed {args.seed + 1}")


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--dims {text}: give whole numbers as in 384,192,64") from None


# ---------------------------------------------------------------------------------------- anytime
def _budget(text: str) -> float | None:
    """None for a curve."""
    if text == "curve":
        return None
    try:
        budget = float(text)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no budget: give multiply-accumulates per query, as 1.5e9, or curve")
    return budget


def anytime(args: argparse.Namespace) -> None:
    from autoreid import data, plots_anytime
    from autoreid.anytime import CONFIDENCES, study
    from autoreid.plots import save
    from autoreid.runs import folder_name, write_json

    set_threads()
    require_protocol(args.protocol)
    device = device_of(args.device)
    folder = Path(args.out) / folder_name(args.dataset) / f"{Path(args.weights).stem}-anytime"
    record, curve, examples = (folder / name for name in ("anytime.json", "curve.png", "examples.png"))
    for path in (record, curve, examples):
        may_write("--out", str(path), args.overwrite)
    splits = data.load(args.dataset, args.root, parts=("query", "gallery"))
    usual = CONFIDENCES if args.budget is None else CONFIDENCES[:1]
    found = study(
        args.weights, splits, budget=args.budget, confidences=[args.confidence] if args.confidence else usual,
        against=args.against, protocol=args.protocol, timed=args.timed, seed=args.seed, device=device,
    )
    write_json(record, found.record)
    print_figures(args, found.record, _anytime_text(found.record))
    save(plots_anytime.curve(found.record), curve)
    title = f"{Path(args.weights).stem} on {splits.name}: who left where"
    save(plots_anytime.examples(found.easy, found.hard, found.asking, found.answering, title, splits.name_of), examples)
    for path in (record, curve, examples):
        say(str(path))
    streams = found.record["streams"]
    budget = "curve" if args.budget is not None else f"{streams[len(streams) // 2]['budget']:.4g}"
    propose(f"autoreid anytime {shlex.quote(args.weights)} --dataset {args.dataset}{root_of(args)} --budget {budget} "
            "--overwrite")


def _anytime_text(record: Mapping[str, Any]) -> str:
    """The study's record as tables."""

    def quality(row: Mapping[str, Any]) -> str:
        return f"{100 * row['mAP']:>6.1f} {100 * row['cmc']['1']:>7.1f}"

    lines = [f"{record['model']} on {record['dataset']}, {record['protocol']}, fusion weights "
             + ", ".join(f"{w:.3f}" for w in record["fusion"]),
             f"{'exit':22} {'MACs alone':>15} {'MACs run':>15} {'ms':>8} {'mAP':>6} {'rank-1':>7}"]

    def priced(name: Any, row: Mapping[str, Any], ms: float) -> str:
        return f"{name:<22} {row['macs']:>15,} {row['macs_run']:>15,} {ms:>8.2f} {quality(row)}"

    lines += [priced(row["exit"], row, row["latency_ms"]["median"]) for row in record["exits"]]
    if record["ensemble"]:
        lines.append("ensemble in this order, the most recent answers; under run and ms what it took so far")
        ms = 0.0
        for row in record["ensemble"]:
            ms += row["latency_ms"]["median"]
            lines.append(priced(row["model"][:22], row, ms))
    wide = max(22, 6 * len(record["exits"]))
    lines.append(f"{'stream':9} {'budget':>15} {'MACs run':>15} {'left at each exit (%)':>{wide}} {'mAP':>12} "
                 f"{'rank-1':>12}")
    for row in record["streams"]:
        left = " ".join(f"{100 * share:>5.1f}" for share in row["left"])
        spread = " ".join(f"{100 * f['mean']:>5.1f} ± {100 * f['std']:>4.1f}" for f in (row["mAP"], row["cmc"]["1"]))
        lines.append(f"{row['confidence']:9} {row['budget']:>15,.0f} {row['macs_run']['mean']:>15,.0f} "
                     f"{left:>{wide}} {spread}")
    lines.append(f"alone: the stages and the exit's own head; run: the heads passed on the way too, which a budget counts; "
                 f"± over {record['streams'][0]['orders']} orders of the queries")
    if (timed := record["timed"]) is not None:
        ms_of = {name: timed[f"{name}_ms"]["mean"] for name in ("stream", "full", "stream_network", "full_network")}
        lines.append(
            f"measured on {timed['device']}, {timed['queries']} queries one by one ({timed['confidence']}, budget "
            f"{timed['budget']:,.0f}): {ms_of['stream']:.2f} ms per query on average, {ms_of['full']:.2f} ms with the "
            f"whole network (without the searches {ms_of['stream_network']:.2f} and {ms_of['full_network']:.2f}); left at "
            f"the exits: {', '.join(map(str, timed['left']))}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- a gallery in use
def _gallery_commands(command: Callable[..., Parser]) -> None:
    p = command("index", "embed a folder of pictures into a gallery file, add to it, remove from it, and set the distance "
                "at which two pictures match; without DIR and options, say what is in it",
                "autoreid index people --weights results/market/resnet50-s0.safetensors --out people.index", index)
    p.add_argument("gallery", nargs="?", metavar="DIR", help="pictures in DIR/<identity>/*.jpg, or named as "
                   "0002_c1s1_000451_03.jpg (identity 0002), or any, each an identity of its own")
    p.add_argument("--out", metavar="INDEX", required=True, help="the gallery file")
    p.add_argument("--weights", metavar="FILE", help="a .safetensors file that retrain wrote; of an index that is there: "
                   "the same file, where it no longer lies where it lay")
    p.add_argument("--add", action="store_true", help="add the pictures of DIR to the index that is there")
    p.add_argument("--remove", action="append", default=[], metavar="NAME,...", help="take identities out")
    p.add_argument("--dtype", default="float32", metavar="NAME", help="of a new index: float32, float16 or int8")
    p.add_argument("--validation", metavar="DIR|DATASET", help="set the threshold by labelled pictures of people whom the "
                   "network was not trained on: a folder, or a dataset's training images (of its own dataset the "
                   "identities that were held out)")
    p.add_argument("--root", metavar="DIR", help="where the dataset of --validation lies")
    p.add_argument("--false-match-rate", type=float, default=1e-3, metavar="RATE", help="the share of pairs of different "
                   "people that may match")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="make the index anew where one is there")
    json_option(p)

    p = command("find", "whom a picture shows: the nearest pictures of a gallery, their distances, and whether they match",
                "autoreid find query.jpg --index people.index --picture found.png", find)
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--index", required=True, metavar="INDEX", help="a file that `autoreid index` wrote")
    p.add_argument("--weights", metavar="FILE", help="the weights that made the index, where they no longer lie where they "
                   "lay")
    p.add_argument("--top", type=whole, default=10, metavar="N", help="answers")
    p.add_argument("--by", default="image", metavar="NAME", help="image, or identity: the nearest picture of each of the "
                   "nearest identities")
    p.add_argument("--engine", default="auto", metavar="NAME", help="exact; hnsw: a graph by faiss, approximate, made on "
                   "first use and kept beside the index; auto: the graph where there is one, the gallery is large and the "
                   "queries are few")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--html", metavar="FILE.html", help="also write a page with the pictures in it")
    picture_options(p, "also draw the answers: green within the threshold, grey beyond it")
    json_option(p)


def index(args: argparse.Namespace) -> int:
    from autoreid.index import Index
    from autoreid.runs import Preempted, heeding_sigterm

    set_threads()
    out, there = shlex.quote(args.out), Path(args.out).exists()
    may_write("--out", args.out, True)
    names = [name for text in args.remove for name in text.split(",") if name]
    if args.add and args.overwrite:
        raise UserError("--add and --overwrite contradict each other: give one of them")
    if args.gallery is None and (args.add or args.overwrite):
        option = "--add" if args.add else "--overwrite"
        raise UserError(f"{option} needs the folder of pictures: autoreid index DIR --out {out} {option}")
    device = device_of(args.device)
    if args.gallery is None or args.add:
        if args.dtype != "float32":
            raise UserError(f"--dtype {args.dtype}: an index keeps the one it was made with; make it anew with --overwrite")
        gallery = Index.open(args.out, args.weights, device)
    elif args.weights is None:
        if there and not args.overwrite:
            raise UserError(f"{args.out} is there already: --add adds to it, --overwrite (with --weights) makes it anew")
        raise UserError("a new index needs --weights FILE, which `autoreid retrain` writes")
    else:
        gallery = Index.create(args.out, args.weights, args.dtype, device, args.overwrite)
    figures: dict[str, Any] = {}
    try:
        with heeding_sigterm():
            if names:
                figures["removed"] = gallery.remove(names)
            if args.gallery is not None:
                change = gallery.add(args.gallery)
                figures |= vars(change)
                for path in change.unreadable:
                    say(f"left out, as it cannot be read: {path}")
                if change.clipped:
                    say(f"warning: {change.clipped:,} of {change.values:,} values lie beyond the range of the int8 index "
                        "and were clipped: its scale was set by its first pictures; where these are many, make it anew "
                        "with --overwrite")
                if not len(gallery):
                    raise UserError(f"none of the {counted(len(change.unreadable), 'picture')} in {args.gallery} can be "
                                    f"read: {args.out} was not written")
            if args.validation is not None:
                gallery.calibrate(args.validation, args.root, args.false_match_rate)
    except Preempted:
        kept = f"the {counted(len(gallery), 'picture')} embedded so far are in {args.out}" if Path(args.out).exists() else (
            "nothing was embedded yet")
        more = "--add" if Path(args.out).exists() else f"--weights {shlex.quote(args.weights or '')} --dtype {args.dtype}"
        say(f"stopped by SIGTERM; {kept}, go on with: autoreid index {shlex.quote(args.gallery or '')} --out {out} {more}")
        return 0
    summary = gallery.summary()
    print_figures(args, {**summary, **figures}, _index_text(summary, figures))
    propose(f"autoreid find IMAGE --index {out}" if summary["threshold"] else
            f"autoreid index --out {out} --validation DIR --false-match-rate 1e-3")
    return 0


def _index_text(summary: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    words = {"added": "added", "replaced": "replaced, as they had changed", "present": "there already",
             "removed": "removed"}
    lines = [f"{counted(changed[key], 'picture')} {said}" for key, said in words.items() if changed.get(key)]
    if changed.get("unreadable"):
        lines.append(f"{counted(len(changed['unreadable']), 'picture')} could not be read")
    weights, threshold = summary["weights"], summary["threshold"]
    scale = f" with scale {summary['scale']:.6g}" if summary["scale"] else ""
    lines += [
        f"{summary['index']}, edition {summary['edition']}: {counted(summary['pictures'], 'picture')} of "
        f"{summary['identities']} {'identity' if summary['identities'] == 1 else 'identities'}, {summary['bytes']:,} bytes",
        f"by {weights['label']} ({weights['path']}, SHA-256 {weights['sha256'][:12]}...), {summary['dims']} dims, "
        f"{summary['dtype']}{scale}",
    ]
    if threshold is None:
        lines.append("no threshold: nothing is called a match")
    else:
        across = " of two cameras" if threshold["across_cameras"] else ""
        lines.append(
            f"match at a distance of at most {threshold['distance']:.4f}: {100 * threshold['false_match_rate']:.3g} % of "
            f"{threshold['impostors']:,} pairs{across} of different people match (asked: {100 * threshold['asked']:g} %), "
            f"{100 * threshold['false_non_match_rate']:.1f} % of {threshold['genuine']:,} pairs of one person do not; "
            f"{threshold['identities']} identities, {threshold['source']}"
        )
    return "\n".join(lines)


def find(args: argparse.Namespace) -> None:
    from autoreid.index import Index

    set_threads()
    may_write("--picture", args.picture, args.overwrite, ".png")
    may_write("--html", args.html, args.overwrite, ".html")
    gallery = Index.open(args.index, args.weights, device_of(args.device))
    engine = gallery.chosen_engine(args.engine, len(args.images))
    lists = gallery.search(args.images, args.top, args.by, engine)
    threshold, summary = gallery.threshold, gallery.summary()
    found = [{"image": image, "matches": [match._asdict() for match in matches]}
             for image, matches in zip(args.images, lists, strict=True)]
    figures = {**{key: summary[key] for key in ("index", "edition", "pictures", "identities", "threshold")}, "by": args.by,
               "engine": engine, "queries": found}
    lines = [] if threshold is None else [
        f"match: distance at most {threshold.distance:.4f} (false-match rate {100 * threshold.asked:g} %)"]
    for query in found:
        lines += [query["image"], f"{'rank':>4}  {'identity':20} {'distance':>9} {'cosine':>7}  {'':8}  picture"]
        lines += [f"{m['rank']:>4}  {m['identity']:20} {m['distance']:>9.4f} {m['cosine']:>7.4f}  "
                  f"{ {True: 'match', False: 'no match', None: ''}[m['match']]:8}  {m['path']}" for m in query["matches"]]
    print_figures(args, figures, "\n".join(lines))
    if args.picture or args.html:
        from autoreid import plots_index
        from autoreid.plots import save
        from autoreid.runs import write_text

        title = f"Found in {Path(args.index).name}, {counted(len(gallery), 'picture')}"
        if args.picture:
            save(plots_index.answers(found, title, threshold is not None), args.picture)
            say(f"picture: {args.picture}")
        if args.html:
            notes = [*lines[: threshold is not None], f"{summary['weights']['label']}, {engine} search, by {args.by}"]
            write_text(args.html, plots_index.page(found, title, notes))
            say(f"page: {args.html}")
    if threshold is None:
        say(f"no threshold, so nothing is called a match: autoreid index --out {shlex.quote(args.index)} --validation DIR")
    again = shlex.join(["autoreid", "find", *args.images, "--index", args.index])
    other = "image" if args.by == "identity" else "identity"
    propose(f"{again} --by {other}" if args.html else f"{again} --html found.html")

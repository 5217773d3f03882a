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
    evaluation_of,
    evaluation_options,
    json_option,
    may_write,
    pastable,
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
    views_options,
    whole,
)
from autoreid.errors import UserError
from autoreid.recipe import RECIPES
from autoreid.runs import say

COMMANDS: tuple[str, ...] = ("anytime", "compress", "index", "find", "export")
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
    p.add_argument("--methods", metavar="NAME,...", help="full, slice, low-rank, prune, pca, pq, int8 (of the full "
                   "embedding after training) or cut (the first dimensions after training); default all but cut, of "
                   "weights pca, pq, int8 and cut")
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
    p.add_argument("--gallery", type=whole, metavar="N", help="time the search among N embeddings: the dataset's gallery, "
                   "repeated with a little noise")
    p.add_argument("--overwrite", action="store_true", help="train all anew, and replace what is there")
    json_option(p)

    _gallery_commands(command)
    _export_command(command)


def compress(args: argparse.Namespace) -> None:
    from autoreid import compress as compression
    from autoreid import parallel, plots
    from autoreid.network import find_model, load_weights
    from autoreid.plots_compress import curve
    from autoreid.recipe import Recipe, find_recipe
    from autoreid.runs import folder_name, write_json

    set_threads()
    changes, sizes = changes_of(args), _sizes(args.dims)
    trained = not args.model.endswith(".safetensors")
    methods = compression.USUAL[trained] if args.methods is None else args.methods.split(",") if args.methods else []
    device = parallel.start(device_of(args.device))
    compression.check_gallery(args.dataset, args.root, args.gallery)
    if trained:
        of_recipe: dict[str, Any] = {key: changes.pop(key) for key in list(changes) if key in Recipe.__dataclass_fields__}
        spec = find_model(args.model, changes)
        label = spec.label
        folder = compression.train(
            spec, args.dataset, find_recipe(args.recipe or preset_of(args.dataset), of_recipe), args.out, methods=methods,
            sizes=sizes, int8=args.int8, seed=args.seed, root=args.root, device=device, workers=args.workers,
            cache=args.cache, init=args.init, overwrite=args.overwrite,
        )
        timed = compression.smallest_weights(folder, label, args.seed)
    else:
        if changes or args.recipe or args.init != "scratch":
            raise UserError(f"{args.model}: trained weights are compressed as they are; leave out --set, --epochs, "
                            "--input, --recipe and --init, or give the model's name to train it")
        weights = Path(args.model)
        label, folder = load_weights(weights)[1].get("name", weights.stem), Path(args.out) / folder_name(args.dataset)
        folder, timed = folder / f"{weights.stem}-compress", [weights]
        compression.fit_all(weights, args.dataset, folder, methods=methods, sizes=sizes, int8=args.int8, root=args.root,
                            device=device, overwrite=args.overwrite)
    found = compression.summary(folder, label, args.dataset)
    made = [compression.search(path, args.dataset, gallery=args.gallery, root=args.root, device=device) for path in timed]
    beside = folder if trained else Path(args.model).parent
    found["search"] = [*made, *compression.earlier_searches(folder, made, beside)]
    if parallel.is_first():
        write_json(folder / "compress.json", found)
        plots.save(curve(found), folder / "curve.png")
    print_figures(args, found, f"{compression.describe(found)}\ncurve: {folder / 'curve.png'}")
    if trained:
        asked = {"--methods": args.methods, "--dims": args.dims, "--int8": args.int8, "--recipe": args.recipe,
                 "--init": args.init, "--epochs": args.epochs, "--input": args.input and "{}x{}".format(*args.input),
                 "--out": args.out, "--device": args.device, "--workers": args.workers, "--cache": args.cache,
                 "--gallery": args.gallery}
        usual = {"--int8": "also", "--init": "scratch", "--out": "results", "--device": "auto", "--workers": 0}
        given = {name: str(value) for name, value in asked.items() if value not in (None, usual.get(name))}
        words = [word for pair in given.items() for word in pair]
        words += [word for pair in args.changes for word in ("--set", pair)]
        propose(f"autoreid compress {shlex.quote(args.model)} --dataset {args.dataset}{root_of(args)} "
                f"{shlex.join([*words, '--seed', str(args.seed + 1)])}")
    else:
        propose(f"autoreid index GALLERY_DIR --weights {shlex.quote(args.model)} --out gallery.index --dtype int8")


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
    save(plots_anytime.examples(found.easy, found.hard, found.asking, found.answering, title, splits.name_of,
                                found.confidence), examples)
    for path in (record, curve, examples):
        say(str(path))
    streams = found.record["streams"]
    budget = "curve" if args.budget is not None else f"{streams[len(streams) // 2]['budget']:.4g}"
    options = {"--protocol": args.protocol, "--out": None if args.out == "results" else args.out, "--budget": budget,
               "--seed": str(args.seed) if args.seed else None, "--device": None if args.device == "auto" else args.device}
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    words += ["--against", *args.against] if args.against else []  # it writes the same files anew
    propose(f"autoreid anytime {shlex.quote(args.weights)} --dataset {args.dataset}{root_of(args)} "
            f"{shlex.join([*words, '--overwrite'])}")


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
        so_far = 0.0
        for row in record["ensemble"]:
            so_far += row["latency_ms"]["median"]
            lines.append(priced(row["model"][:22], row, so_far))
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
        ms = {name: f"{of['mean']:.2f} ms (median {of['median']:.2f})" for name in (
            "stream", "full", "stream_network", "full_network") for of in [timed[f"{name}_ms"]]}
        lines.append(
            f"measured on {timed['device']}, {timed['queries']} queries one by one ({timed['confidence']}, budget "
            f"{timed['budget']:,.0f}): {ms['stream']} per query on average, {ms['full']} with the whole network; without "
            f"the searches {ms['stream_network']} and {ms['full_network']}; left at the exits: "
            f"{', '.join(map(str, timed['left']))}"
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
    if args.validation is None and (args.root is not None or args.false_match_rate != 1e-3):
        option = "--root" if args.root is not None else "--false-match-rate"
        raise UserError(f"{option} is of --validation: give the labelled pictures that set the threshold")
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
    names = [name for text in args.remove for name in ([text] if text in gallery.identities else text.split(",")) if name]
    if args.validation is not None:  # before the work, not after it
        gallery.validation(args.validation, args.root, args.false_match_rate)
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
        written = bool(len(gallery))  # with --overwrite another index may lie there still
        again = ["autoreid", "index", *([args.gallery] if args.gallery else []), "--out", args.out]
        again += ["--weights", args.weights] if args.weights else []
        if args.gallery and (written or args.add):
            again.append("--add")
        elif args.gallery:
            again += ["--dtype", args.dtype, *(["--overwrite"] if args.overwrite else [])]
        for option, value in (("--validation", args.validation), ("--root", args.root)):
            again += [option, value] if value else []
        if args.validation:
            again += ["--false-match-rate", str(args.false_match_rate)]
        kept = f"{args.out} holds {counted(len(gallery), 'picture')} so far" if written else "nothing was embedded yet"
        say(f"stopped by SIGTERM; {kept}, go on with: {pastable(shlex.join(again))}")
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
    engine = gallery.chosen_engine(args.engine, len(args.images), args.top)
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
    again = shlex.join(["autoreid", "find", *args.images, "--index", args.index,
                        *(["--weights", args.weights] if args.weights else [])])
    other = "image" if args.by == "identity" else "identity"
    propose(f"{again} --by {other}" if args.html else f"{again} --html found.html")


# ---------------------------------------------------------------------------------------- a file to deploy
def _export_command(command: Callable[..., Parser]) -> None:
    p = command("export", "write a network for ONNX Runtime, OpenVINO or torch.export, held against PyTorch on real "
                "images, its accuracy and latency measured in that runtime on this CPU", "autoreid export "
                "results/market/resnet50-s0.safetensors --format onnx --int8 --root ~/data", export)
    p.add_argument("weights", metavar="WEIGHTS", help="a .safetensors file that retrain wrote")
    p.add_argument("--format", required=True, metavar="NAME", help="onnx, torch-export or openvino")
    p.add_argument("--int8", action="store_true", help="weights and activations in 8 bits, calibrated on training images "
                   "(onnx and openvino)")
    p.add_argument("--inside", action="store_true", help="the graph takes pixels, uint8, and normalises them itself")
    p.add_argument("--exit", type=_exit, metavar="N|all", help="of a network with exits: cut after exit N, or give the "
                   "embeddings of all")
    p.add_argument("--batch", type=_batch, default="dynamic", metavar="N|dynamic", help="pictures that the graph takes at "
                   "once")
    p.add_argument("--dataset", metavar="NAME", help="whose training images calibrate and are compared on, and whose query "
                   "and gallery are ranked; default the one that the network was trained on")
    p.add_argument("--root", metavar="DIR", help="the folder that holds the dataset's folder, or that itself")
    p.add_argument("--images", type=whole, default=128, metavar="N", help="training images to calibrate and compare on")
    p.add_argument("--min-cosine", type=float, metavar="X", help="between the file's embedding and PyTorch's of one image, "
                   "or nothing is written; default 0.999, with --int8 0.7")
    p.add_argument("--no-evaluate", action="store_true", help="leave query and gallery alone: no mAP and no result file")
    protocol_option(p)
    views_options(p, "1")
    evaluation_options(p)
    p.add_argument("--out", metavar="FILE", help="default beside the weights, ending in .onnx, .pt2 or .xml")
    p.add_argument("--result", metavar="DIR", help="the folder of results, as retrain's --out; default where the weights "
                   "are, if that is their dataset's folder of results, else results")
    p.add_argument("--overwrite", action="store_true", help="replace the file, its record and its result")
    json_option(p)


def _exit(text: str) -> int | str:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no exit: give a number from 1, or all")
    return text if text == "all" else int(text)


def _batch(text: str) -> int | None:
    """None for any number."""
    if text != "dynamic" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no batch size: give a number from 1, or dynamic")
    return None if text == "dynamic" else int(text)


def export(args: argparse.Namespace) -> None:
    from autoreid import export as exporting
    from autoreid.network import load_weights
    from autoreid.runtimes import find_format

    set_threads()
    require_protocol(args.protocol)
    found, how = find_format(args.format, args.int8), evaluation_of(args)
    if args.min_cosine is not None and not -1 <= args.min_cosine <= 1:
        raise UserError(f"--min-cosine {args.min_cosine}: a cosine lies between -1 and 1")
    plan = exporting.Plan(args.format, args.int8, args.inside, args.exit, args.batch)
    dataset = args.dataset or load_weights(args.weights)[1]["dataset"]
    out = args.out or str(plan.file_beside(args.weights))
    may_write("--out", out, args.overwrite, found.ending)
    for path in exporting.files_of(Path(out)):
        may_write("--out", str(path), args.overwrite)
    if not args.no_evaluate:
        may_write("--result", str(exporting.result_of(args.weights, plan, dataset, args.result)), args.overwrite)
    path, record, result = exporting.export(
        args.weights, plan, out=out, dataset=dataset, root=args.root, images=args.images, min_cosine=args.min_cosine,
        evaluate=not args.no_evaluate, protocol=args.protocol, how=how, results=args.result,
    )
    print_figures(args, record, exporting.summary(path, record))
    for written in (*exporting.files_of(path), *([result] if result else [])):
        say(str(written))
    if result:
        propose(f"autoreid compare {shlex.quote(str(result.parent))}")
    else:
        again = [f"--{name}" for name in ("int8", "inside") if getattr(args, name)]
        again += [f"--{name} {value}" for name in ("exit", "batch", "dataset", "out") if (value := getattr(args, name))]
        propose(f"autoreid export {shlex.quote(args.weights)} --format {' '.join([args.format, *again])}{root_of(args)} "
                "--overwrite")

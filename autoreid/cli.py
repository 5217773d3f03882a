"""The command line: every command parses, calls one function of the package and prints what it returns.

torch is imported inside the commands, so that ``autoreid --help`` answers at once. Exit status: 0 done, 2 a user's
mistake (one line on stderr; ``--debug`` adds the traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoreid import cli_deploy
from autoreid.cli_parts import (
    PROTOCOL_NAMES,
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
    numbers_of,
    pastable,
    picture_options,
    preset_of,
    print_figures,
    propose,
    protocol_option,
    provenance_of,
    require_protocol,
    root_of,
    running_options,
    seed_option,
    set_threads,
    size,
    training_options,
    views_options,
    whole,
)
from autoreid.errors import UserError, unknown
from autoreid.recipe import RECIPES
from autoreid.runs import Preempted, heeding_sigterm, processes, say, without_password
from autoreid.version import __version__

COMMANDS = ("demo", "data", "search", "retrain", "evaluate", "score", "cost", "density", "tune", "sweep", "compare",
            *cli_deploy.COMMANDS)
RESUMABLE = ("demo", "search", "retrain", "tune", "sweep", *cli_deploy.RESUMABLE)  # what SIGTERM stops with its state saved
LISTS = 50  # as high as a picture can be
JOINED = ("tune", "sweep", *cli_deploy.JOINED)  # the same command goes on by itself
GLOBAL_OPTIONS = ("-h", "--help", "--version")


def build_parser() -> Parser:
    parser = Parser(
        prog="autoreid", description="Find, train and deploy re-identification networks.",
        epilog="start with: autoreid demo",
    )
    parser.add_argument("--version", action="version", version=f"autoreid {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=Parser)

    def command(name: str, text: str, example: str, run: Any) -> Parser:
        p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}")
        p.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
        p.set_defaults(run=run)
        return p

    p = command("demo", "search, retrain and compare on the embedded drawn people, in minutes on two CPU cores",
                "autoreid demo --out demo", demo)
    running_options(p, "demo")
    seed_option(p)

    p = command("data", "make (drawn-*) or check a dataset: counts, junk, missing or unreadable files, and the fix",
                "autoreid data market --root ~/data", check_data)
    dataset_option(p, positional=True)
    json_option(p)

    p = command("search", "search a cell by bilevel optimisation with a retrieval loss, on training identities only",
                "autoreid search --dataset market --root ~/data --method gdas", search)
    dataset_option(p)
    p.add_argument("--space", default="reid", metavar="NAME|FILE", help="reid, standard, reid-vehicle or a JSON file")
    p.add_argument("--method", metavar="NAME", help="darts (first order), darts-2 (second order) or gdas; default darts")
    p.add_argument("--preset", metavar="NAME", help="default, autoreid-iccv19, drawn or demo; default: drawn for drawn "
                   "data, default for all other")
    p.add_argument("--arch-loss", metavar="NAME", help="what updates the architecture weights: triplet, retrieval or ce "
                   "(the last two need --set split=image); default triplet")
    training_options(p)
    cache_option(p)
    running_options(p, "searches")
    json_option(p)

    p = command("retrain", "train a derived network or a named one by a recipe, and evaluate it once",
                "autoreid retrain searches/market-reid-gdas-s0/genotype.json --dataset market --root ~/data", retrain)
    p.add_argument("model", metavar="GENOTYPE.json|MODEL", help="a searched genotype, or a name that `autoreid cost` lists")
    dataset_option(p)
    p.add_argument("--recipe", metavar="NAME|FILE", help=f"one of {', '.join(RECIPES)}, or a JSON file of its fields; "
                   "default: drawn for drawn data, default for all other; a model's own paper is best followed with its "
                   "own, a comparison needs a shared one")
    p.add_argument("--init", metavar="scratch|imagenet|FILE", default="scratch", help="start from torchvision's ImageNet "
                   "weights, downloaded or already on this machine, from a file of such weights, or from one that retrain "
                   "wrote for the same model")
    p.add_argument("--match", metavar="GENOTYPE.json", help="build the model in the size of this searched one")
    p.add_argument("--name", help="what to call the result, instead of the model's name")
    p.add_argument("--test", metavar="NAME", help="evaluate on another dataset than the one that is trained on")
    p.add_argument("--test-root", metavar="DIR", help="--root of the dataset of --test, where it is another")
    protocol_option(p)
    views_options(p, "the recipe's, mostly 1")
    evaluation_options(p)
    cache_option(p)
    training_options(p)
    running_options(p, "results")
    json_option(p)

    p = command("evaluate", "evaluate trained weights under a protocol",
                "autoreid evaluate results/market/resnet50-s0.safetensors --dataset market --root ~/data", evaluate)
    p.add_argument("weights", metavar="WEIGHTS", help="a .safetensors file that retrain wrote")
    dataset_option(p)
    protocol_option(p)
    views_options(p, "1")
    evaluation_options(p)
    p.add_argument("--ranked", metavar="FILE.png", help="also draw ranked lists: green a match, red another identity, "
                   "grey junk")
    p.add_argument("--queries", metavar="worst|PATH,...", help="whose lists are drawn: those with the lowest average "
                   "precision, or the queries whose path ends so (FILE, FOLDER/FILE); default worst")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--out", metavar="FILE", help="also write the result JSON here")
    p.add_argument("--overwrite", action="store_true", help="replace the files at --out and --ranked")
    json_option(p)

    p = command("score", "CMC, mAP and mINP of features made by anything",
                "autoreid score query.npz gallery.npz --protocol market1501", score)
    p.add_argument("query", metavar="QUERY.npz", help="features N x D float, identities N int, cameras N int")
    p.add_argument("gallery", metavar="GALLERY.npz", help="the same of the gallery")
    p.add_argument("--protocol", default="market1501", metavar="NAME", help=f"{PROTOCOL_NAMES} (plain: no cameras)")
    p.add_argument("--metric", default="euclidean", metavar="NAME", help="euclidean or cosine")
    p.add_argument("--denominator", default="scored", metavar="NAME", help="of the means over queries: scored, or all "
                   "(a query without a match counts as zero)")
    p.add_argument("--rerank", nargs="?", const="20,6,0.3", metavar="K1,K2,LAMBDA", help="k-reciprocal re-ranking first")
    json_option(p)

    p = command("cost", "parameters, MACs, activation memory and latency of models",
                "autoreid cost darts-v2 resnet50 --input 384x128", cost)
    p.add_argument("models", nargs="*", metavar="MODEL|GENOTYPE.json", help="default: every named model, but for the "
                   "papers' ablations (safr-fig5-*, robust-reid-a to -h and -full) and random genotypes")
    p.add_argument("--input", type=size, default="256x128", metavar="HxW", help="picture size")
    p.add_argument("--match", metavar="GENOTYPE.json", help="build the models in the size of this searched one")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                   help="an option that every named model has")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--no-latency", action="store_true", help="count only: nothing is run")
    picture_options(p, "also draw parameters against MACs")
    json_option(p)

    p = command("density", "the share of activations that are not zero, per residual group (SAFR, figures 3 and 4)",
                "autoreid density results/market/safr-small-s0.safetensors --dataset market --root ~/data", density)
    p.add_argument("models", nargs="+", metavar="MODEL|WEIGHTS", help="a name that `autoreid cost` lists, or a "
                   ".safetensors file that retrain wrote")
    dataset_option(p)
    p.add_argument("--images", type=whole, default=256, metavar="N", help="training images to look at, evenly chosen")
    p.add_argument("--input", type=size, metavar="HxW", help="picture size; default the weights' own, else 256x128")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="a model's option")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    picture_options(p, "also draw the density over the depth")
    json_option(p)

    p = command("tune", "tune the shared recipe with Optuna, judged by a panel of models on held-out training identities; "
                "started again, or on another machine, it joins the study",
                "autoreid tune --dataset market --root ~/data --trials 40", tune)
    dataset_option(p)
    p.add_argument("--trials", type=whole, default=40, metavar="N", help="finished ones of the whole study, by all workers")
    p.add_argument("--recipe", metavar="NAME|FILE", help="the recipe to start from, which keeps what is not tuned; "
                   "default: drawn for drawn data, default for all other")
    p.add_argument("--panel", metavar="NAME,...", help="the models that judge, options behind colons, as in "
                   "resnet18:width=8,safr-small; default: a searched cell, a ResNet, SAFR and Robust-ReID, small ones for "
                   "drawn data")
    p.add_argument("--fields", metavar="KEY,...", help="what is tuned, instead of all: optimizer, lr, weight_decay, "
                   "warmup_share, schedule, batch, triplet, soft_margin, margin, ce_weight, label_smoothing, flip, erase, "
                   "pad_share, jitter, auto_augment, patch, classifier_dropout, drop_path, ema or clip")
    p.add_argument("--folds", type=whole, default=2, metavar="K", help="of the training identities, each held out once; 1: "
                   "a third is held out")
    p.add_argument("--sampler", default="tpe", metavar="NAME", help="tpe, nsga2 or random")
    p.add_argument("--pruner", metavar="NAME", help="median, hyperband or none; default median (none with two objectives)")
    p.add_argument("--objectives", default="mAP", metavar="NAMES", help="mAP, or mAP,seconds of training")
    p.add_argument("--storage", metavar="URL", help="postgresql://USER@HOST/DATABASE, which workers on several machines "
                   "share; default: a journal file beside the trainings")
    p.add_argument("--study", metavar="NAME", help="what to call the study; default the dataset's name")
    cache_option(p)
    training_options(p)
    p.add_argument("--out", metavar="DIR", default="results", help="where to write")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="replace the recipe.json of another study")
    json_option(p)

    p = command("sweep", "train every model of a file on every dataset with every seed, each once, by as many workers as "
                "start this command; killed ones are replaced", "autoreid sweep panel.json --root ~/data", sweep)
    p.add_argument("file", metavar="FILE.json", help='such as {"models": ["resnet50", "safr-small"], '
                   '"datasets": ["market"], "seeds": [0, 1, 2], "recipe": "default"}; an unknown key lists all')
    p.add_argument("--root", metavar="DIR", help="the folder that holds the datasets' folders")
    p.add_argument("--storage", metavar="URL", help="postgresql://USER@HOST/DATABASE, which workers on several machines "
                   "share; default: a journal file in --out")
    p.add_argument("--list", action="store_true", help="only show how far every job is")
    p.add_argument("--retry", action="store_true", help="also the jobs that failed, once more")
    p.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that load pictures, 0 for none")
    cache_option(p)
    p.add_argument("--out", metavar="DIR", default="results", help="where to write")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    json_option(p)

    p = command("compare", "table, Pareto fronts and report over results of one dataset; refuses rows not comparable",
                "autoreid compare results/drawn-people", compare)
    p.add_argument("folder", nargs="?", default="results", metavar="FOLDER", help="a folder of result files")
    p.add_argument("--allow-mixed", action="store_true", help="mark rows that are not comparable instead of refusing")
    json_option(p)

    cli_deploy.add_commands(command)
    return parser


# ---------------------------------------------------------------------------------------- the commands
def demo(args: argparse.Namespace) -> None:
    from autoreid.demo import run_demo

    set_threads()
    text = run_demo(Path(args.out), args.seed, device_of(args.device), args.resume, args.overwrite)
    print(f"{text}\none seed: this shows that the job runs, not which network is better\n"
          f"Pareto fronts: {Path(args.out) / 'results' / 'drawn-people-tiny' / 'pareto.png'}")
    picture = Path(args.out) / "searches" / f"drawn-people-tiny-reid-darts-s{args.seed}" / "genotype.png"
    say(f"searched cell: {picture}")
    say("five times the data, about 15 minutes on two cores:")
    propose("autoreid search --dataset drawn-people")


def check_data(args: argparse.Namespace) -> int:
    from autoreid import data
    from autoreid.search import find_settings

    report = data.check(args.dataset, args.root)
    print_figures(args, report, data.describe(report))
    if report["problems"]:
        say(f"autoreid: {counted(len(report['problems']), 'problem')} in {args.dataset}, listed above with what to do")
        return 2
    # a search halves the training identities, and each half must fill a batch
    half = sum(count["identities"] for part, count in report["splits"].items() if part.split()[-1] == "train") // 2
    fewer = f" --set identities={half}" if half < find_settings(preset_of(args.dataset), {}).identities else ""
    propose(f"autoreid search --dataset {args.dataset}{root_of(args)}{fewer}" if half > 1 else "autoreid data --help")
    return 0


def search(args: argparse.Namespace) -> None:
    from autoreid import data, parallel
    from autoreid.plots import draw_search
    from autoreid.runs import Run, command, folder_name
    from autoreid.search import find_settings, search_config
    from autoreid.search import search as run_search
    from autoreid.space import SearchSpace

    set_threads()
    changes = changes_of(args)
    for name, value in (("method", args.method), ("arch_loss", args.arch_loss)):
        if value is not None:
            changes[name] = value
    settings = find_settings(args.preset or preset_of(args.dataset), changes)
    space, device = SearchSpace.load(args.space), parallel.start(device_of(args.device))
    samples = data.load(args.dataset, args.root, parts=("train",)).train
    folder = Path(args.out) / f"{folder_name(args.dataset)}-{space.name}-{settings.method}-s{args.seed}"
    run = Run(folder, search_config(args.dataset, space, settings, args.seed, parallel.kind(device), len(samples)),
              resume=args.resume, overwrite=args.overwrite)
    provenance = provenance_of(command(), args.dataset, settings.method, args.seed)
    result = run_search(space, samples, settings, run, args.seed, device, args.workers, provenance, args.cache)
    if parallel.is_first():
        draw_search(folder)
    figures = {
        "genotype": str(folder / "genotype.json"), "key": result.genotype.key(), "val_mAP": result.val_mAP,
        "device_hours": result.device_hours, "peak_memory_bytes": result.peak_memory_bytes,
    }
    print_figures(args, figures, f"genotype {result.genotype.key()} in {folder / 'genotype.json'}\n"
             f"search cost {result.device_hours:.3f} {device}-hours, peak memory {result.peak_memory_bytes / 2**30:.2f} "
             f"GiB, validation mAP {100 * result.val_mAP:.1f} %")
    propose(f"autoreid retrain {folder / 'genotype.json'} --dataset {args.dataset}{root_of(args)}")


def retrain(args: argparse.Namespace) -> None:
    from autoreid import parallel
    from autoreid.network import find_model
    from autoreid.recipe import Recipe, find_recipe
    from autoreid.train import retrain as run_retrain

    set_threads()
    require_protocol(args.protocol)
    if args.test_root and not args.test:
        raise UserError(f"--test-root {args.test_root}: it is where the dataset of --test lies; add --test NAME, or leave "
                        "it out")
    changes = changes_of(args)
    for_recipe = {key: changes.pop(key) for key in list(changes) if key in Recipe.__dataclass_fields__}
    try:
        spec = find_model(args.model, changes, args.match)
    except UserError as fault:
        if str(fault).startswith("unknown option of"):  # the user may have meant a field of the recipe
            raise UserError(f"{fault}; recipe fields: {', '.join(sorted(Recipe.__dataclass_fields__))}") from None
        raise
    recipe = find_recipe(args.recipe or preset_of(args.dataset), for_recipe)
    path, result = run_retrain(
        spec, args.dataset, recipe, args.out, root=args.root, test=args.test, test_root=args.test_root,
        protocol=args.protocol, seed=args.seed, device=parallel.start(device_of(args.device)), workers=args.workers,
        how=evaluation_of(args), init=args.init, cache=args.cache, resume=args.resume, overwrite=args.overwrite,
        name=args.name,
    )
    print_figures(args, result, f"{_metrics_line(result)}\nresult in {path}")
    propose(f"autoreid compare {path.parent}")


def evaluate(args: argparse.Namespace) -> None:
    from autoreid import data, parallel
    from autoreid.evaluate import check_task
    from autoreid.network import ModelSpec, load_weights
    from autoreid.ranked import one_list
    from autoreid.runs import write_json
    from autoreid.train import again, measure

    set_threads()
    require_protocol(args.protocol)
    may_write("--out", args.out, args.overwrite)
    may_write("--ranked", args.ranked, args.overwrite, ".png")
    if args.queries is not None and not args.ranked:
        raise UserError(f"--queries {args.queries} says whose lists are drawn: add --ranked FILE.png, or leave it out")
    device, how = parallel.start(device_of(args.device)), evaluation_of(args)
    net, metadata = load_weights(args.weights)
    spec = ModelSpec.from_dict(metadata["model"])
    splits, size = data.load(args.dataset, args.root, parts=("query", "gallery")), tuple(metadata["input"])
    rule, lines = check_task(splits.query, splits.gallery, args.protocol or splits.protocol, how)
    chosen = _chosen(args.queries, splits.query) if args.ranked and one_list(rule) else None
    origin = again(args.weights, metadata, splits)
    origin["warnings"] = [*origin["warnings"], *lines]
    for line in origin["warnings"]:
        say(f"warning: {line}")
    result, extracted = measure(net.to(device), spec, spec.label, splits, size, device=device, how=how, protocol=rule.name)
    result |= origin
    if args.out and parallel.is_first():
        write_json(args.out, result)
    print_figures(args, result, _metrics_line(result))
    if args.ranked and parallel.is_first():  # after the figures: nothing that goes wrong here can lose them
        _draw_ranked(args, extracted, splits, chosen)
    propose(f"autoreid density {args.weights} --dataset {args.dataset}{root_of(args)}")


def score(args: argparse.Namespace) -> None:
    from autoreid.evaluate import Evaluation
    from autoreid.metrics import score as run_score

    rerank = numbers_of("--rerank", args.rerank, "K1,K2,LAMBDA as in 20,6,0.3", (int, int, float))
    how = Evaluation(rerank=rerank, denominator=args.denominator)
    rule = how.check(args.protocol)
    metrics = run_score(args.query, args.gallery, rule, args.metric, args.denominator, rerank).to_dict()
    figures = {**metrics, "metric": args.metric, "rerank": how.to_dict()["rerank"]}
    print_figures(args, figures, _metrics_line({**figures, "queries": metrics}))
    changes = {"--protocol": args.protocol, "--metric": args.metric, "--denominator": args.denominator}
    options = [word for option, value in changes.items() for word in (option, value)]
    again = [] if args.rerank or rule.drawn else ["--rerank"]
    propose(shlex.join(["autoreid", "score", args.query, args.gallery, *options, *again]) if again else "autoreid cost")


def cost(args: argparse.Namespace) -> None:
    from autoreid import cost as costs
    from autoreid.backbones import ABLATIONS
    from autoreid.network import find_model, known_models
    from autoreid.options import split_pairs

    set_threads()
    may_write("--picture", args.picture, args.overwrite, ".png")
    device, rows, left_out = device_of(args.device), [], []
    for name in args.models or [n for n in known_models() if n not in ABLATIONS and not n.startswith("random-")]:
        try:
            spec = find_model(name, split_pairs(args.changes), args.match)
            counted = costs.measure(spec.build, args.input)
        except UserError as fault:
            if args.models:
                raise
            left_out.append(f"{name}: left out: {fault}")
            continue
        latency = None if args.no_latency else costs.latency(spec.build(), args.input, device, at_most_s=3)["median"]
        rows.append({
            "model": spec.label, "input": args.input, "params": counted.params, "macs": counted.macs,
            "flops": 2 * counted.macs, "macs_all": counted.macs_all, "activation_bytes": counted.activation_bytes,
            "latency_ms": latency,
        })
    if not rows:
        raise UserError(f"no model fits these options: name the models, as in autoreid cost resnet50 ({left_out[0]})")
    for line in left_out:
        say(line)
    wide = max(26, *(len(row["model"]) for row in rows))
    lines = [f"{'model':{wide}} {'params':>12} {'MACs':>15} {'FLOPs':>15} {'MACs, all':>15} {'activations':>12}"
             f" {'latency':>10}"]
    lines += [
        f"{r['model']:{wide}} {r['params']:>12,} {r['macs']:>15,} {r['flops']:>15,} {r['macs_all']:>15,} "
        f"{r['activation_bytes'] / 2**20:>8.1f} MiB "
        + (f"{r['latency_ms']:>7.1f} ms" if r["latency_ms"] is not None else f"{'-':>10}")
        for r in rows
    ]
    height, width = args.input
    lines.append(f"one {height} x {width} picture, no classifier; MACs: convolutions, linear layers, products; FLOPs: "
                 "2 x MACs; all: MAC + bias + 2 per batch norm + 1 per ReLU element")
    print_figures(args, rows, "\n".join(lines))
    if args.picture:
        from autoreid.plots import costs as draw_costs
        from autoreid.plots import save

        save(draw_costs(rows), args.picture)
        say(f"picture: {args.picture}")
    propose("autoreid retrain MODEL --dataset drawn-people")


def density(args: argparse.Namespace) -> None:
    from autoreid import data
    from autoreid.density import activation_density
    from autoreid.loading import load_images, normalise
    from autoreid.network import find_model, load_weights
    from autoreid.options import split_pairs
    from autoreid.plots import draw_density

    set_threads()
    may_write("--picture", args.picture, args.overwrite, ".png")
    if not args.images:
        raise UserError("--images 0: give at least 1")
    device, measured = device_of(args.device), {}
    samples = data.load(args.dataset, args.root, parts=("train",)).train
    step = max(1, len(samples) // args.images)
    samples = samples[::step][: args.images]
    for name in args.models:
        if name.endswith(".safetensors"):
            net, header = load_weights(name)
            label, size = Path(name).stem, args.input or header["input"]
        else:
            spec = find_model(name, split_pairs(args.changes))
            net, label, size = spec.build(), spec.label, args.input or [256, 128]
            say(f"{name}: fresh weights; what training does to the density is seen with a .safetensors of retrain")
        batches = (normalise(load_images(samples[i : i + 32], tuple(size))) for i in range(0, len(samples), 32))
        measured[label] = {row.group: row.density for row in activation_density(net.to(device), batches)}
    lines = [f"{label}\n" + "\n".join(f"  {group:12} {100 * value:5.1f} %" for group, value in rows.items())
             for label, rows in measured.items()]
    lines.append(f"share of activations that are not zero, over {len(samples)} training images; 100 % where no ReLU ends a "
                 "group: hard-swish, GELU and batch norm make no zeros")
    print_figures(args, measured, "\n".join(lines))
    if args.picture:
        draw_density(measured, args.picture)
        say(f"picture: {args.picture}")
    propose("autoreid density WEIGHTS.safetensors --dataset NAME --picture density.png")


def tune(args: argparse.Namespace) -> None:
    from autoreid.plots import draw_study
    from autoreid.recipe import find_recipe
    from autoreid.runs import folder_name
    from autoreid.tune import PANELS, SPACE, summary
    from autoreid.tune import tune as run_tune

    set_threads()
    preset = preset_of(args.dataset)
    found = run_tune(
        args.dataset, find_recipe(args.recipe or preset, changes_of(args)),
        PANELS[preset] if args.panel is None else args.panel, args.out,
        root=args.root, trials=args.trials, tuned=tuple(SPACE) if args.fields is None else args.fields.split(","),
        folds=args.folds, sampler=args.sampler, pruner=args.pruner, objectives=args.objectives, storage=args.storage,
        name=args.study, seed=args.seed, device=device_of(args.device), workers=args.workers, cache=args.cache,
        overwrite=args.overwrite,
    )
    folder = Path(args.out) / folder_name(args.dataset)
    for path in draw_study(folder):
        say(f"picture: {path}")
    recipe = folder / "recipe.json"
    figures = {key: found[key] for key in ("study", "storage", "counts", "best", "base", "front", "importance")}
    print_figures(args, {"recipe": str(recipe), **figures}, summary(found, recipe))
    propose(f"autoreid retrain MODEL --dataset {args.dataset}{root_of(args)} --recipe {shlex.quote(str(recipe))}")


def sweep(args: argparse.Namespace) -> int:
    from autoreid.sweep import Sweep, run, states

    set_threads()
    asked = Sweep.read(args.file)
    if args.list:
        rows = states(asked, args.out, args.storage)
    else:
        rows = run(asked, args.out, root=args.root, storage=args.storage, device=device_of(args.device),
                   workers=args.workers, cache=args.cache, retry=args.retry)
    width = max(len(row["job"]) for row in rows)
    print_figures(args, rows, "\n".join(f"{row['job']:{width}}  {row['text']}" for row in rows))
    where = {"--root": args.root, "--storage": args.storage and without_password(args.storage),
             "--out": None if args.out == "results" else args.out}
    again = shlex.join(["autoreid", "sweep", args.file, *(word for pair in where.items() if pair[1] for word in pair)])
    if args.list and not all(row["state"] == "finished" for row in rows):
        propose(again)
        return 0
    for folder in sorted({str(Path(row["result"]).parent) for row in rows if row["result"]}):
        propose(f"autoreid compare {shlex.quote(folder)}")
    failed = sum(row["state"] == "failed" for row in rows)
    if failed:
        say(f"autoreid: {failed} of {counted(len(rows), 'job')} failed, for the reasons above; when they are mended: "
            f"{pastable(again)} --retry")
    return 2 if failed else 0


def compare(args: argparse.Namespace) -> None:
    from autoreid import compare as comparison
    from autoreid.report import write_comparison

    args.folder = comparison.result_folder(args.folder)
    results = comparison.read_results(args.folder)
    table = comparison.table(results, allow_mixed=args.allow_mixed)
    written = write_comparison(Path(args.folder), table)
    print_figures(args, json.loads(table.to_json(orient="records")), comparison.format_table(table))
    for path in written:
        print(path, file=sys.stderr)
    propose("autoreid retrain MODEL --dataset NAME --seed N")


# ---------------------------------------------------------------------------------------- small parts


def _metrics_line(result: dict[str, Any]) -> str:
    cmc, queries = result["cmc"], result["queries"]
    how = [result["protocol"], counted(result["views"], "view")] if "views" in result else [result["protocol"]]
    how += [result["metric"]] if "metric" in result else []
    how += [f"{name} {','.join(map(str, result[name].values()))}" for name in ("rerank", "expand") if result.get(name)]
    if result["std"] is not None:
        std = result["std"]
        how.append(f"mean of {result['repeats']} draws of the gallery, mAP ± {100 * std['mAP']:.1f}, rank-1 ± "
                   f"{100 * std['cmc']['1']:.1f}")
    if result["unreadable"]:
        how.append(counted(result["unreadable"], "unreadable image") + " left out")
    return (
        f"mAP {100 * result['mAP']:.1f} %, rank-1 {100 * cmc['1']:.1f} %, rank-5 {100 * cmc['5']:.1f} %, rank-10 "
        f"{100 * cmc['10']:.1f} %, mINP {100 * result['mINP']:.1f} %, trapezoid mAP {100 * result['mAP_trapezoid']:.1f} "
        f"%, {queries['scored']} of {queries['total']} queries {'counted' if result['denominator'] == 'all' else 'scored'} "
        f"({', '.join(how)})"
    )


def _chosen(names: str | None, queries: Sequence[Any]) -> list[Any] | None:
    """The queries that the user names by the end of their path; None for the worst."""
    if names in (None, "worst"):
        return None
    chosen: list[Any] = []
    for name in names.split(","):  # type: ignore[union-attr]
        end = os.path.normpath(name) if name else ""
        found = [q for q in queries if name and f"{os.sep}{q.path}".endswith(end if os.path.isabs(end) else os.sep + end)]
        if not found:
            raise UserError(f"--queries {name}: no query's path ends so; the first query is {queries[0].path}")
        chosen += found
    if len(chosen) > LISTS:
        raise UserError(f"--queries {names}: {len(chosen)} queries' paths end so, a picture has room for {LISTS}; give "
                        "more of the path, as in FOLDER/FILE")
    return chosen


def _draw_ranked(args: argparse.Namespace, extracted: Any, splits: Any, chosen: list[Any] | None) -> None:
    """Lists of the worst queries, or of the chosen ones, as a picture: in the ranking of which the figures are."""
    from autoreid.plots import ranked_lists as draw
    from autoreid.plots import save
    from autoreid.ranked import ranked_lists

    place = {sample: i for i, sample in enumerate(extracted.asking)}  # a chosen one may be unreadable
    lists = ranked_lists(**extracted.ranking(), queries=chosen and [place[s] for s in chosen if s in place])
    if not lists:
        raise UserError("--ranked: none of the chosen queries could be read, so there is no list to draw")
    gone = set(extracted.unreadable)  # a tracklet is shown by the first frame that is there
    query, gallery = ([s._replace(path=next(path for path in s.frames or (s.path,) if path not in gone)) for s in side]
                      for side in (extracted.asking, extracted.answering))
    title = f"{Path(args.weights).stem} on {splits.name}: {'the worst' if chosen is None else 'chosen'} queries"
    how = [counted(extracted.how.views, "view"), *(name for name in ("rerank", "expand") if getattr(extracted.how, name))]
    save(draw(lists, query, gallery, f"{title} ({', '.join(how)})", splits.name_of), args.ranked)
    say(f"ranked lists: {args.ranked}")


def _complain(text: str) -> None:
    """One line on stderr, by whichever process it is: its fault ends them all."""
    print(text, file=sys.stderr, flush=True)


def _again(argv: Sequence[str]) -> str:
    """The command that goes on with the one that was stopped."""
    kept = [a for a in argv if a not in ("--resume", "--overwrite")]
    again = shlex.join(["autoreid", *kept, *(["--resume"] if argv[0] not in JOINED else [])])
    return f"torchrun --nproc-per-node {processes()} -m {again}" if processes() > 1 else pastable(without_password(again))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    try:
        parser = build_parser()
        if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        if argv and argv[0].startswith("-") and argv[0] not in GLOBAL_OPTIONS:
            raise unknown("option", argv[0], GLOBAL_OPTIONS)
        args = parser.parse_args(argv)
        if getattr(args, "resume", False) and getattr(args, "overwrite", False):
            raise UserError("--resume and --overwrite contradict each other: give one of them")
        if args.command not in RESUMABLE:
            return args.run(args) or 0
        with heeding_sigterm():
            return args.run(args) or 0
    except Preempted:
        say(f"stopped by SIGTERM; the state is saved, resume with: {_again(argv)}")
        return 0
    except KeyboardInterrupt:
        say(f"interrupted; nothing written is lost, go on with: {_again(argv)}" if argv and argv[0] in RESUMABLE
            else "interrupted")
        return 130
    except UserError as fault:
        if debug:
            traceback.print_exc()
        text = f"autoreid: {fault}" if not str(fault).startswith("autoreid") else str(fault)
        _complain(text)
        return 2
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and "allocate" not in str(fault) and "out of memory" not in str(fault):
            raise
        if debug:
            traceback.print_exc()
        _complain("autoreid: out of memory; take a smaller network, picture or batch (--input, --set identities=...), or "
                  "free some memory; nothing already written is lost")
        return 2
    except BrokenPipeError:  # the reader of our figures went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as fault:
        if debug:
            traceback.print_exc()
        where = f" ({fault.filename})" if fault.filename else ""
        _complain(f"autoreid: the system refused to read or write{where}: {fault.strerror or fault}; free some space, mend "
            "the permission or choose another folder with --out or --root; nothing already written is lost")
        return 2


if __name__ == "__main__":
    sys.exit(main())

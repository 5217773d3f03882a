"""The whole job, small: search a cell on drawn people, retrain it beside two controls by one recipe, compare.

The controls are what a search must beat: a random genotype of the same space, and a ResNet-18 of the whole width whose
parameters come nearest. One seed and a few minutes show that the job runs, not which network is better; the recorded
results say more.
"""

from __future__ import annotations

from pathlib import Path

from autoreid import compare, data, plots, report
from autoreid.errors import UserError
from autoreid.network import find_model
from autoreid.recipe import find_recipe
from autoreid.runs import Run, command, commit, say
from autoreid.search import find_settings, search, search_config
from autoreid.space import SearchSpace
from autoreid.train import retrain

DATASET = "drawn-people-tiny"
MODELS = ("searched", "random", "resnet18-like")


def run_demo(out: Path, seed: int, device: str, resume: bool, overwrite: bool) -> str:
    """Search, retrain three networks, compare; everything is written under ``out``. Returns the table's text.

    A demo that was interrupted goes on where it stood, without being asked; a finished one needs ``overwrite``.
    """
    searches, results = out / "searches", out / "results"
    space, settings = SearchSpace.load("reid"), find_settings("demo", {})
    folder = searches / f"{DATASET}-{space.name}-{settings.method}-s{seed}"
    finished = results / DATASET / "comparison.csv"
    if finished.exists() and not (overwrite or resume):
        raise UserError(
            f"{out} already holds a finished demo: add --overwrite to run it anew (make demo ARGS=--overwrite), or "
            "--out DIR"
        )
    if overwrite:  # all of it at once: no old network beside a new search
        finished.unlink(missing_ok=True)
        for name in MODELS:
            one = results / DATASET / f"{name}-s{seed}"
            Run.clear(one, [one.with_name(one.name + ending) for ending in (".json", ".safetensors")])
        Run.clear(folder, [])

    say(f"1/3 search: {settings.method} over the space {space.name}, {settings.epochs} epochs")
    samples = data.load(DATASET, parts=("train",)).train
    run = Run(folder, search_config(DATASET, space, settings, seed, device, len(samples)), resume=True, overwrite=False)
    search(space, samples, settings, run, seed, device, provenance={
        "command": command(), "dataset": DATASET, "method": settings.method, "seed": seed, "commit": commit(),
    })
    plots.draw_search(folder)

    genotype, recipe = folder / "genotype.json", find_recipe("demo")
    specs = (
        find_model(str(genotype)),
        find_model("random-reid", {"genotype_seed": seed}, match=genotype),
        find_model("resnet18", {"stem": 3}, match=genotype),
    )
    for number, (name, spec) in enumerate(zip(MODELS, specs, strict=True), start=1):
        say(f"2/3 retrain {number}/{len(MODELS)}: {name}, {recipe.epochs} epochs of one shared recipe")
        retrain(spec, DATASET, recipe, results, seed=seed, device=device, resume=True, name=name)

    say("3/3 compare")
    table = compare.table(compare.read_results(results / DATASET))
    for path in report.write_comparison(results / DATASET, table):
        say(str(path))
    return compare.format_table(table)

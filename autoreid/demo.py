"""The whole job, small: search a cell on drawn people, retrain it beside two controls by one recipe, compare.

The controls are what a search must beat: a random genotype of the same space and size, and a ResNet-18 with as many
parameters. One seed and a few minutes show that the job runs, not which network is better; results/ holds that.
"""

from __future__ import annotations

from pathlib import Path

from autoreid import compare, data, plots, report
from autoreid.errors import UserError
from autoreid.network import find_model
from autoreid.runs import Run, command, commit, say
from autoreid.search import find_settings, search, search_config
from autoreid.space import SearchSpace
from autoreid.train import find_recipe, retrain

DATASET = "drawn-people-tiny"


def run_demo(out: Path, seed: int, device: str, resume: bool, overwrite: bool) -> str:
    """Search, retrain three networks, compare; everything is written under ``out``. Returns the table's text.

    A demo that was interrupted goes on where it stood, without being asked; a finished one needs ``overwrite``.
    """
    searches, results = out / "searches", out / "results"
    space, settings = SearchSpace.load("reid"), find_settings("demo", {})
    folder = searches / f"{DATASET}-{space.name}-{settings.method}-s{seed}"
    finished = results / DATASET / "comparison.csv"
    if finished.exists() and not (overwrite or resume):
        raise UserError(f"{out} already holds a finished demo: add --overwrite to run it anew, or --out DIR")
    if overwrite:
        finished.unlink(missing_ok=True)
    resume = not overwrite

    say(f"1/3 search: {settings.method} over the space {space.name}, {settings.epochs} epochs")
    samples = data.load(DATASET, parts=("train",)).train
    run = Run(folder, search_config(DATASET, space, settings, seed, device, len(samples)), resume=resume,
              overwrite=overwrite)
    search(space, samples, settings, run, seed, device, provenance={
        "command": command(), "dataset": DATASET, "method": settings.method, "seed": seed, "commit": commit(),
    })
    plots.draw_search(folder)

    genotype, recipe = folder / "genotype.json", find_recipe("demo")
    models = {
        "searched": find_model(str(genotype)),
        "random": find_model("random-reid", {"genotype_seed": seed}, match=genotype),
        "resnet18-like": find_model("resnet18", {"stem": 3}, match=genotype),
    }
    for number, (name, spec) in enumerate(models.items(), start=1):
        say(f"2/3 retrain {number}/{len(models)}: {name}, {recipe.epochs} epochs of one shared recipe")
        retrain(spec, DATASET, recipe, results, seed=seed, device=device, resume=resume, overwrite=overwrite, name=name)

    say("3/3 compare")
    table = compare.table(compare.read_results(results / DATASET))
    for path in report.write_comparison(results / DATASET, table):
        say(str(path))
    return compare.format_table(table)

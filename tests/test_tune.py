"""Tuning: what the trials choose, who judges, what a trial is worth, and real studies whose workers are killed.

Most studies here train nothing: a planted ``fit`` gives the mAP that the recipe deserves. The rest train networks of a
few thousand parameters on pictures of 32 x 16.
"""

import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import planted
import pytest
import reference_tune
import torch
from postgres import Server

import autoreid.tune
from autoreid import data, studies
from autoreid.cli import main
from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.network import ModelSpec
from autoreid.recipe import Recipe, find_recipe
from autoreid.runs import Preempted, Run
from autoreid.train import Diverged, Training
from autoreid.tune import (
    PANELS,
    SAMPLERS,
    SPACE,
    PerTrial,
    Space,
    find_panel,
    identity_folds,
    importances,
    mean_ranks,
    normalised_rank,
    tune,
)

BASE = Recipe(input=(32, 16), optimizer="sgd", lr=0.02, epochs=3, warmup_epochs=1, identities=3, images=2, pad=2, erase=0.2)
MODELS = ("resnet18-stem3-width4", "safr-small-width4")
PANEL = "resnet18:stem=3:width=4,safr-small:width=4"
FIELDS = ("lr", "erase", "clip")


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """Ten people to train on; query and gallery do not exist."""
    folder = planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=10, test_identities=3)
    for part in ("query", "bounding_box_test"):
        shutil.rmtree(folder / "Market-1501-v15.09.15" / part)
    return folder


def deserved(model: str, recipe: Recipe, epoch: int) -> float:
    """Best at the rate 0.01, rising with the epochs; the second model is worth a tenth of the first."""
    quality = math.exp(-0.5 * math.log10(recipe.lr / 0.01) ** 2) * (1 - 0.2 * recipe.erase)
    return quality * epoch / recipe.all_epochs * (0.6 if model == MODELS[0] else 0.06)


@pytest.fixture
def training(monkeypatch):
    """A fit that trains nothing, and the list of its calls: (model, fold's first held-out identity, learning rate, epoch
    at which the panel stopped it). ``training.faults``: what it raises, by learning rate."""
    calls: list[tuple[str, float, int]] = []

    def fit(net, samples, recipe, run, seed, device, workers, cache, held_out, report):
        run.folder.mkdir(parents=True, exist_ok=True)
        epoch, model = 0, run.config["model"]
        try:
            for epoch in range(1, recipe.all_epochs + 1):
                fault = faults(recipe, epoch)
                if fault is not None:
                    raise fault
                if epoch % recipe.eval_every == 0 or epoch == recipe.all_epochs:
                    report(epoch, deserved(model, recipe, epoch))
        finally:
            calls.append((model, recipe.lr, epoch))
        return Training(recipe.all_epochs, 1000 * recipe.erase, 1.0, 1, "cpu")

    def faults(recipe, epoch):
        return None

    monkeypatch.setattr(autoreid.tune, "fit", fit)
    monkeypatch.setattr(autoreid.tune, "check_start", lambda *_: None)
    monkeypatch.setattr(ModelSpec, "build", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(studies, "POLL_S", 0.01)

    class Planted:
        def __init__(self):
            self.calls = calls

        def fails(self, fault):
            nonlocal faults
            faults = fault

    return Planted()


def study(market, out, **options):
    options = {"root": str(market), "trials": 8, "tuned": FIELDS, "sampler": "random", **options}
    return tune("market", options.pop("base", BASE), options.pop("panel", PANEL), out, **options)


def states(found):
    return [row["state"] for row in found["trials"]]


# ---------------------------------------------------------------------------------------- what the trials choose
@pytest.mark.parametrize("name", ["default", "drawn", "autoreid", "safr", "robust-reid", "dare"])
def test_a_recipe_is_parameters_and_back(name):
    base = find_recipe(name)
    space = Space(base, tuple(SPACE), 100)
    assert space.recipe_of(space.references["base"]) == base
    for params in space.references.values():
        recipe = space.recipe_of(params)
        assert space.params_of(recipe) == params and space.recipe_of(space.params_of(recipe)) == recipe
    kept = set(asdict_without(base, *SPACE, "warmup_epochs", "milestones", "gamma", "momentum_late", "cycle_epochs",
                              "identities", "images", "pad", "lr_min"))
    draw = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        params = space.suggest(draw.ask())
        recipe = space.recipe_of(params)
        assert space.recipe_of(space.params_of(recipe)) == recipe
        assert kept <= set(asdict_without(recipe)) and recipe.identities * recipe.images == base.identities * base.images
        assert ("margin" in params) == (not params["soft_margin"])
        assert ("label_smoothing" in params) == (recipe.ce_weight > 0)


def asdict_without(recipe, *names):
    return {(name, value) for name, value in vars(recipe).items() if name not in names}


def test_the_papers_recipes_are_carried_over_to_the_base():
    space = Space(find_recipe("drawn"), tuple(SPACE), 100)
    assert list(space.references) == ["base", "autoreid", "safr", "robust-reid", "dare"]
    recipes = {name: space.recipe_of(params) for name, params in space.references.items()}
    assert {(r.epochs, r.input, r.identities, r.images) for r in recipes.values()} == {(12, (64, 32), 16, 4)}
    auto, safr, robust, dare = (recipes[name] for name in autoreid.tune.SEEDS)
    assert (auto.optimizer, auto.lr, auto.schedule, auto.milestones, auto.gamma) == ("adam", 3.5e-3, "step", (4, 7), 0.1)
    assert auto.ce_weight == 1 and auto.triplet_weight == 1  # the paper's 0.5 and 0.5: what counts is their proportion
    assert auto.pad == 2  # 10 pixels of 384
    assert (safr.lr, safr.warmup_epochs, safr.milestones, safr.gamma) == (1e-4, 3, (6, 10), 0.6)
    assert (robust.optimizer, robust.lr, robust.soft_margin, robust.triplet) == ("sgd", 0.03, True, "batch-soft")
    assert (dare.schedule, dare.milestones, dare.momentum_late, dare.ce_weight) == ("exponential", (6,), 0.5, 0)
    assert "cyclic" not in Space(replace(BASE, epochs=1, warmup_epochs=0), ("schedule",), 5).schedules


def test_only_the_named_fields_are_tuned_and_the_base_is_always_held():
    base = replace(BASE, lr=0.5, clip=3.0)
    space = Space(base, ("lr", "clip"), 5)
    assert set(space.axes) == {"lr", "clip"} and space.axes["lr"].high == 0.5 and 3.0 in space.axes["clip"].options
    assert space.recipe_of(space.references["base"]) == base and list(space.references) == [
        "base", "autoreid", "safr", "robust-reid", "dare"]
    assert list(Space(BASE, ("flip",), 5).references) == ["base"]  # the others are the same in what is tuned
    low = space.recipe_of({"lr": 1e-7, "clip": 0.0})
    assert low.lr_min == 1e-7 and low.pad == base.pad  # no rate below its own floor
    assert Space(BASE, ("batch",), 5).axes["batch"].options == ("3x2",)
    assert Space(replace(BASE, identities=4, images=4), ("batch",), 8).axes["batch"].options == ("8x2", "4x4", "2x8")
    assert Space(replace(BASE, identities=4, images=4), ("batch",), 5).axes["batch"].options == ("4x4", "2x8")
    for averaged in ({"swa_epochs": 1}, {"swag_cycles": 1}):
        assert "ema" not in Space(replace(BASE, **averaged), tuple(SPACE), 5).references["base"]
    with pytest.raises(UserError, match=r"unknown field to tune 'lrr'; did you mean 'lr'\? known: auto_augment, batch, "):
        Space(BASE, ("lrr",), 5)
    with pytest.raises(UserError) as fault:
        Space(replace(BASE, weight_decay=0.0), ("weight_decay",), 5)
    assert str(fault.value) == ("weight_decay=0.0: it is tuned on a logarithmic scale from 1e-05 to 0.1; start from a "
                                "number above 0, or leave weight_decay out of --fields")


# ---------------------------------------------------------------------------------------- who judges
def people(identities, images=2):
    return [Sample(f"{i:03d}_{k}.jpg", i, k + 1) for i in range(identities) for k in range(images)]


@pytest.mark.parametrize("folds", [1, 2, 3, 5])
def test_the_identities_of_a_fold_never_train(folds):
    samples = people(11)
    parts = identity_folds(samples, folds, seed=0)
    assert len(parts) == folds
    judged = []
    for train, held in parts:
        assert not {s.identity for s in train} & {s.identity for s in held} and sorted(train + held) == samples
        judged += {s.identity for s in held}
    assert len(judged) == len(set(judged)) == (3 if folds == 1 else 11)
    assert parts == identity_folds(samples, folds, seed=0) != identity_folds(samples, folds, seed=1)


def test_too_few_identities_for_the_folds():
    for samples, folds, of, fold, held in (
        (people(5), 3, 5, 2, 1), (people(5), 1, 5, 0, 1), (people(6, images=1), 3, 6, 0, 2)):
        with pytest.raises(UserError) as fault:
            identity_folds(samples, folds, seed=0)
        assert str(fault.value) == (
            f"--folds {folds}: fold {fold} holds out {held} of {of} identities, and none can be asked for: each fold needs "
            "two or more, one of them seen by two cameras (or, without cameras, twice); give fewer folds or more training "
            "images")
    with pytest.raises(UserError, match=r"^--folds=0: allowed is 1 \(a third"):
        identity_folds(people(5), 0, seed=0)


def test_the_panel_of_an_option():
    assert tuple(spec.label for spec in find_panel(PANEL)) == MODELS
    assert dict(find_panel("darts-v2:layers=1x1:channels=4")[0].backbone)["layers"] == (1, 1)
    for text, words in (
        ("resnet18:8", "--panel resnet18:8: give models by NAME or NAME:key=value:..., with commas between them, as in "
                       "resnet18:width=8,safr-small"),
        ("resnet18,", "--panel resnet18,: give models by NAME or NAME:key=value"),
        ("resnet18,resnet18", "--panel resnet18,resnet18: resnet18 is in it twice, and would count twice; name it once"),
        ("resnet81", "unknown model 'resnet81'; did you mean 'resnet18'?"),
    ):
        with pytest.raises(UserError) as fault:
            find_panel(text)
        assert str(fault.value).startswith(words)
    for panel in PANELS.values():
        families = [spec.label for spec in find_panel(panel)]
        assert len(families) == 4 and all(any(name.startswith(family) for name in families)
                                          for family in ("autoreid", "resnet", "safr", "robust-reid"))


# ---------------------------------------------------------------------------------------- what a trial is worth
def test_ranks_are_those_of_the_slow_twin():
    rng = random.Random(0)
    for _ in range(300):
        references = [rng.choice((0.0, 1.0, rng.random(), rng.randrange(10) / 10)) for _ in range(rng.randrange(1, 7))]
        for value in (0.0, 1.0, rng.random(), rng.randrange(10) / 10, rng.choice(references)):
            assert normalised_rank(value, references) == pytest.approx(reference_tune.normalised_rank(value, references))
        models = ("a", "b", "c")[: rng.randrange(1, 4)]
        mAPs = [{model: rng.randrange(4) / 4 for model in models} for _ in range(rng.randrange(1, 9))]
        assert mean_ranks(mAPs) == pytest.approx(reference_tune.mean_ranks(mAPs))
    assert mean_ranks([]) == []


def test_a_rank_rises_with_the_map_and_forgets_the_models_scale():
    references = [0.2, 0.5, 0.5, 0.8]
    assert [normalised_rank(x, references) for x in (0.0, 0.1, 0.2, 0.5, 0.8, 1.0)] == pytest.approx(
        [0, 0.1, 0.2, 0.5, 0.8, 1])
    assert normalised_rank(0.35, references) == pytest.approx(0.35)
    values = [normalised_rank(x / 1000, references) for x in range(1001)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False))
    narrow = [0.5 + x / 100 for x in references]  # between its references a model with a hundredth of the spread is as loud
    assert [normalised_rank(0.5 + x / 100, narrow) for x in (0.2, 0.35, 0.6, 0.8)] == pytest.approx(
        [normalised_rank(x, references) for x in (0.2, 0.35, 0.6, 0.8)])
    assert normalised_rank(0.4, [0.0, 0.0, 0.0]) == 0.4  # all references failed


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trials_draw_depends_on_the_seed_and_its_number(name):
    def drawn(seed, skipped=0):
        made = optuna.create_study(sampler=PerTrial(SAMPLERS[name], seed))
        for _ in range(skipped):
            made.add_trial(optuna.trial.create_trial(value=0.0))
        return [made.ask().suggest_float("x", 0, 1) for _ in range(3)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0)[1:] == drawn(0, skipped=1)[:2] and len(set(drawn(0))) == 3  # another worker took the first


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_important_is_what_the_best_trials_share(directions):
    """Planted: ``x`` makes the best trials, ``y`` the worst, ``z`` nothing."""
    made = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
    assert importances(made) == {}
    for _ in range(80):
        trial = made.ask()
        x, y, z = (trial.suggest_float(name, 0, 1) for name in "xyz")
        value = 1 + x if x > 0.75 else y - 1 if y < 0.25 else 0.01 * z
        made.tell(trial, [value, z][: len(directions)])
    shares = importances(made)
    assert list(shares)[0] == "x" and shares["x"] > 0.8 and sum(shares.values()) == pytest.approx(1)


# ---------------------------------------------------------------------------------------- a study
def test_a_study_starts_with_the_references_and_ends_with_a_recipe(market, tmp_path, training):
    found = study(market, tmp_path, trials=12)
    rows = found["trials"]
    assert [row["reference"] for row in rows] == ["base", "autoreid", "safr", "robust-reid", "dare"] + [None] * 7
    assert set(states(found)) <= {"finished", "pruned"} and found["counts"]["finished"] >= 5
    references = [row["mAP"] for row in rows[:5]]
    for row in rows:
        if row["state"] == "finished":
            places = [reference_tune.normalised_rank(row["mAP"][model], [mAP[model] for mAP in references])
                      for model in MODELS]
            assert row["value"] == pytest.approx(sum(places) / 2)
            recipe = replace(BASE, lr=row["params"]["lr"], erase=row["params"]["erase"])
            assert row["mAP"] == pytest.approx({model: deserved(model, recipe, 3) for model in MODELS})
    complete = [row for row in rows if row["state"] == "finished"]
    assert [row["best_value"] for row in complete] == list(itertools.accumulate((row["value"] for row in complete), max))
    ranks = reference_tune.mean_ranks([row["mAP"] for row in complete])
    assert [row["mean_rank"] for row in complete] == pytest.approx(ranks)
    assert found["best"] == min(complete, key=lambda row: (row["mean_rank"], -row["value"]))
    assert found["references"]["base"]["mAP"] == rows[0]["mAP"] and found["base"] == rows[0]
    assert sum(found["importance"].values()) == pytest.approx(1) and next(iter(found["importance"])) == "lr"

    path = tmp_path / "market" / "recipe.json"
    recipe = find_recipe(str(path))
    best = found["best"]["params"]
    assert recipe == replace(BASE, **best)
    told = json.loads(path.read_text())["provenance"]
    assert (told["study"], told["trial"], told["folds"]) == ("market", found["best"]["number"], 2)
    assert told["panel"] == list(MODELS)
    assert told["mAP"] == {"best": found["best"]["mAP"], "base": rows[0]["mAP"]} and told["command"]
    assert told["mean_rank"]["best"] == found["best"]["mean_rank"] <= told["mean_rank"]["base"]
    table = list(csv.DictReader((tmp_path / "market" / "study.csv").open()))
    assert [int(row["number"]) for row in table] == list(range(12))
    assert [row["lr"] for row in table] == [str(row["params"]["lr"]) for row in rows]
    assert float(table[0][f"mAP {MODELS[0]}"]) == rows[0]["mAP"][MODELS[0]]
    assert json.loads((tmp_path / "market" / "study.json").read_text())["trials"] == rows
    assert not list((tmp_path / "market" / "tune" / "market").glob("market-*"))  # weights are not kept


def test_every_model_of_the_panel_is_heard_before_any_is_trained_on(market, tmp_path, training):
    study(market, tmp_path, trials=5)
    first = [(model, epoch) for model, lr, epoch in training.calls if lr == BASE.lr]
    assert first == [(model, epoch) for _ in range(2) for epoch in (1, 2, 3) for model in MODELS]


def test_the_same_seed_is_the_same_study_and_another_is_not(market, tmp_path, training):
    def chosen(folder, **options):
        rows = study(market, tmp_path / folder, **options)["trials"]
        return [(row["params"], row["state"], row["value"]) for row in rows]

    first = chosen("a", sampler="tpe", trials=16)
    assert first == chosen("b", sampler="tpe", trials=16)
    assert first[5:] != chosen("c", sampler="tpe", trials=16, seed=1)[5:]
    halves = chosen("d", sampler="tpe", trials=9)
    assert halves == first[:9] and chosen("d", sampler="tpe", trials=16) == first  # started again, it goes on


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_bad_trial_is_pruned_at_its_first_rung(market, tmp_path, training, pruner):
    found = study(market, tmp_path, trials=20, pruner=pruner)
    pruned = [row for row in found["trials"] if row["state"] == "pruned"]
    assert pruned and all(row["reference"] is None and row["mAP"] is None for row in pruned)
    assert not any(row["state"] == "pruned" for row in found["trials"][:5])
    early = [row for row in pruned if len(row["steps"]) == 1]
    assert early  # of six reports
    for row in early:  # stopped before the second rung, but not before both models were heard
        assert [(model, epoch) for model, lr, epoch in training.calls if lr == row["params"]["lr"]] == [
            (model, 1) for model in MODELS]
    finished = [row["steps"][0] for row in found["trials"] if row["state"] == "finished"]
    assert max(row["steps"][0] for row in early) < max(finished)
    assert "pruned" not in states(study(market, tmp_path / "none", trials=20, pruner="none"))


def test_trials_that_fail_are_recorded_and_the_study_goes_on(market, tmp_path, training):
    def fails(recipe, epoch):
        if recipe.lr > 0.02:  # the reference robust-reid has 0.03
            return Diverged("training diverged in epoch 1: the loss is nan")
        if recipe.lr < 1e-4:
            return MemoryError("no more")
        return RuntimeError("CUDA out of memory. Tried to allocate") if 2e-4 < recipe.lr < 1e-3 else None

    training.fails(fails)
    found = study(market, tmp_path, trials=25, pruner="none")
    robust = next(row for row in found["trials"] if row["reference"] == "robust-reid")
    assert robust["state"] == "failed" and robust["reason"] == (
        f"{MODELS[0]}, fold 0: training diverged in epoch 1: the loss is nan")
    assert found["references"]["robust-reid"]["mAP"] == dict.fromkeys(MODELS, 0.0)
    assert found["references"]["robust-reid"]["reason"] == robust["reason"]
    reasons = {row["reason"].split(":")[0].split(",")[0] for row in found["trials"] if row["state"] == "failed"}
    assert reasons == {MODELS[0], "out of memory"}
    assert found["counts"]["failed"] + found["counts"]["finished"] == 25 and found["counts"]["finished"] >= 3
    assert found["best"]["state"] == "finished"
    table = list(csv.DictReader((tmp_path / "market" / "study.csv").open()))
    assert sum(row["state"] == "failed" and bool(row["reason"]) for row in table) == found["counts"]["failed"]
    assert not list((tmp_path / "market" / "tune" / "market").glob("market-*"))


def test_a_study_without_a_finished_trial_has_no_recipe(market, tmp_path, training):
    training.fails(lambda recipe, epoch: Diverged("the loss is inf"))
    with pytest.raises(UserError) as fault:
        study(market, tmp_path, trials=6)
    assert str(fault.value).startswith(
        f"study market: none of its trials was finished, so there is no recipe ({MODELS[0]}, fold 0: the loss is inf; ")
    assert str(fault.value).endswith("; start from another --recipe in another --study NAME")
    assert (tmp_path / "market" / "study.csv").exists() and not (tmp_path / "market" / "recipe.json").exists()


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_two_objectives(market, tmp_path, training, sampler):
    found = study(market, tmp_path, trials=14, objectives="mAP,seconds", sampler=sampler)
    assert set(states(found)) == {"finished"}
    for row in found["trials"]:  # planted: a thousand seconds of a training by the chance to erase; four trainings
        assert row["seconds"] == pytest.approx(4000 * row["params"]["erase"])
    points = {row["number"]: (row["value"], row["seconds"]) for row in found["trials"]}
    beaten = {a for a, (value, seconds) in points.items() for other in points.values()
              if other[0] >= value and other[1] <= seconds and other != (value, seconds)}
    assert found["front"] == sorted(set(points) - beaten) and len(found["front"]) >= 2


def test_resumed_after_a_stop_the_study_is_the_one_that_was_not_stopped(market, tmp_path, training):
    whole = study(market, tmp_path / "whole", trials=9, pruner="none")
    wanted_calls = len(training.calls)
    for stop_at in (3, 50, 73):  # in the references, between two rungs of one, in a later trial
        stopped = {"calls": 0}

        def stops(recipe, epoch, stopped=stopped, stop_at=stop_at):
            stopped["calls"] += 1
            return Preempted() if stopped["calls"] == stop_at else None

        training.fails(stops)
        out, before = tmp_path / f"stopped-{stop_at}", len(training.calls)
        with pytest.raises(Preempted):
            study(market, out, trials=9, pruner="none")
        assert list((out / "market" / "tune" / "market").glob("market-*")), "where the training goes on"
        found = study(market, out, trials=9, pruner="none")
        told = [(row["params"], row["value"]) for row in found["trials"] if row["state"] == "finished"]
        wanted = [(row["params"], row["value"]) for row in whole["trials"]]
        assert [told.count(one) for one in wanted[:5]] == [1] * 5 and len(told) == 9
        assert found["references"] == whole["references"]
        assert len(training.calls) - before == wanted_calls + 1  # the one that was stopped; what was done is not done again


def test_a_study_is_joined_by_the_same_question_only(market, tmp_path, training):
    first = study(market, tmp_path)
    calls = len(training.calls)
    again = study(market, tmp_path)
    assert again["trials"] == first["trials"] and len(training.calls) == calls  # it only writes the files anew
    for options, words in (
        ({"folds": 3}, "folds=2, now folds=3: give the same options, or another --study NAME"),
        ({"panel": "resnet18:stem=3:width=4"}, "panel.safr-small-width4="),
        ({"base": replace(BASE, lr=0.03)}, "recipe.lr=0.02, now recipe.lr=0.03: "),
        ({"tuned": ("lr",)}, 'fields=["clip", "erase", "lr"], now fields=["lr"]: '),
        ({"sampler": "tpe"}, 'sampler="random", now sampler="tpe": '),
    ):
        with pytest.raises(UserError) as fault:
            study(market, tmp_path, overwrite=True, **options)
        assert str(fault.value).startswith(f"study market was started with {words}")
    path = tmp_path / "market" / "recipe.json"
    command = json.loads(path.read_text())["provenance"]["command"]
    with pytest.raises(UserError) as fault:
        study(market, tmp_path, name="other")
    assert str(fault.value) == (
        f"{path} was not written by this study (study market, {command}): add --overwrite to replace it, or write "
        "elsewhere with --out DIR")
    assert not (tmp_path / "market" / "tune" / "other").exists()  # seen before any work
    study(market, tmp_path, name="other", overwrite=True)
    assert json.loads(path.read_text())["provenance"]["study"] == "other"
    path.write_text('{"lr": 0.5}')
    with pytest.raises(UserError, match="recipe.json was not written by this study: add --overwrite"):
        study(market, tmp_path, name="other")


def test_a_study_in_postgresql_is_the_one_in_a_journal(market, tmp_path, training):
    """Two machines' folders, one database: the second joins, trains nothing and writes the same recipe."""
    with Server() as server:
        url = server.database("tune")
        options = {"sampler": "tpe", "trials": 11}
        found = study(market, tmp_path / "one", storage=url, **options)
        calls = len(training.calls)
        again = study(market, tmp_path / "two", storage=url, **options)
    assert again["trials"] == found["trials"] and len(training.calls) == calls and found["storage"] == url
    recipes = [find_recipe(str(tmp_path / machine / "market" / "recipe.json")) for machine in ("one", "two")]
    assert recipes[0] == recipes[1]
    journal = study(market, tmp_path / "journal", **options)
    assert [(row["params"], row["value"]) for row in journal["trials"]] == [
        (row["params"], row["value"]) for row in found["trials"]]


@pytest.mark.parametrize(("options", "words"), [
    ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean 'tpe'? known: nsga2, random, tpe"),
    ({"pruner": "medain"}, "unknown pruner 'medain'; did you mean 'median'? known: hyperband, median, none"),
    ({"objectives": "mAP,params"}, "unknown objectives 'mAP,params'; known: mAP, mAP,seconds"),
    ({"objectives": "mAP,seconds", "pruner": "median"},
     "--pruner median: two objectives give no one value to prune by; give --pruner none, or --objectives mAP"),
    ({"name": "a/b"}, "--study=a/b: allowed is letters, digits, '.', '_', '+' and '-'"),
    ({"tuned": ()}, "--fields=: allowed is one or more of optimizer, lr, weight_decay, warmup_share, "),
    ({"trials": 4},
     "--trials=4: allowed is 5 or more: the references are the first (base, autoreid, safr, robust-reid, dare)"),
    ({"base": replace(BASE, identities=6)},
     "identities=6: the folds leave 5 identities to train on; give --set identities=5 or fewer, or more --folds"),
    ({"folds": 9}, "--folds 9: fold 1 holds out 1 of 10 identities"),
    ({"storage": "sqlite:///x.db"}, "--storage sqlite:///x.db: allowed is postgresql://"),
])
def test_mistakes_are_named_before_any_work(market, tmp_path, training, options, words):
    with pytest.raises(UserError) as fault:
        study(market, tmp_path, **options)
    assert str(fault.value).startswith(words)
    assert not training.calls


# ---------------------------------------------------------------------------------------- real trainings
def test_a_real_study_trains_on_the_other_folds_and_goes_on_bit_for_bit(market, tmp_path, monkeypatch):
    """Query and gallery do not exist here. Stopped in the middle of a training, it ends as one that was not."""
    samples = data.load("market", market, parts=("train",)).train
    real, seen = autoreid.tune.fit, []

    def watched(net, train, recipe, run, seed, device, workers, cache, held_out, report):
        seen.append((frozenset(s.identity for s in train), frozenset(s.identity for s in held_out), seed))
        return real(net, train, recipe, run, seed, device, workers, cache, held_out, report)

    monkeypatch.setattr(autoreid.tune, "fit", watched)
    monkeypatch.setattr(studies, "POLL_S", 0.01)
    options = {"panel": "resnet18:stem=3:width=4", "tuned": ("erase",), "trials": 4, "seed": 3, "pruner": "none"}
    whole = study(market, tmp_path / "whole", **options)
    everyone = {s.identity for s in samples}
    assert {train | held for train, held, _ in seen} == {frozenset(everyone)} and not any(a & b for a, b, _ in seen)
    assert len({held for _, held, _ in seen}) == 2 and {seed for *_, seed in seen} == {3000, 3001}
    assert states(whole) == ["finished"] * 4
    assert all(0 < row["mAP"]["resnet18-stem3-width4"] < 1 and row["seconds"] > 0 for row in whole["trials"])

    save, saved = Run.save, []

    def stop(run, state):
        save(run, state)
        saved.append(state["epoch"])
        if len(saved) == 8:  # the second epoch of a rung's training
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", stop)
        study(market, tmp_path / "halves", **options)
    halves = study(market, tmp_path / "halves", **options)

    def figures(found):
        rows = [row for row in found["trials"] if row["state"] == "finished"]
        return sorted((row["params"]["erase"], *row["mAP"].values()) for row in rows)

    assert figures(halves) == figures(whole) and len(figures(whole)) == 4
    path = tmp_path / "whole" / "market" / "recipe.json"
    assert find_recipe(str(path)).erase == whole["best"]["params"]["erase"]


def test_a_real_training_that_diverges_fails_its_trial_alone(market, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "POLL_S", 0.01)
    found = study(market, tmp_path, panel="resnet18:stem=3:width=4:neck=none", base=replace(BASE, lr=1e30, epochs=4),
                  tuned=("lr",), trials=5, folds=1)
    assert states(found)[0] == "failed"
    assert found["trials"][0]["reason"].startswith("resnet18-necknone-stem3-width4, fold 0: training diverged in epoch ")
    assert found["counts"]["finished"] == 4 and found["base"] is None
    told = json.loads((tmp_path / "market" / "recipe.json").read_text())["provenance"]
    assert told["mAP"]["base"] == dict.fromkeys(told["panel"], 0.0) and told["mean_rank"]["base"] is None


COMMAND = ["--dataset", "market", "--panel", "resnet18:stem=3:width=4", "--fields", "erase", "--folds", "2", "--pruner",
           "none", "--sampler", "random", "--device", "cpu", "--epochs", "6", "--input", "32x16", "--set", "identities=3",
           "--set", "images=2", "--set", "pad=2", "--set", "lr=0.02", "--set", "erase=0.2"]


def worker(market, out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "autoreid", "tune", *COMMAND, "--root", str(market), "--out", str(out), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def trials_of(out, name="market"):
    """What the storage holds, as a third process sees it."""
    journal = out / "market" / "tune" / "market" / "study.journal"
    if not journal.exists():
        return []
    storage, _ = studies.open_storage(None, journal.parent)
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    except KeyError:  # not there yet
        return []


def test_two_workers_share_a_study_and_one_is_killed(market, tmp_path):
    """Real processes, SIGKILL in the middle of a trial: nothing finished is lost, and nothing is done twice."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    workers = [worker(market, tmp_path, "--trials", "7", "--json") for _ in range(2)]
    killed = kill_in_a_trial(workers[0], tmp_path)
    before = {t.number: t.value for t in trials_of(tmp_path) if t.state.name == "COMPLETE"}
    out, err = workers[1].communicate(timeout=300)
    assert (workers[0].returncode, workers[1].returncode) == (-signal.SIGKILL, 0), err
    trials, references = trials_of(tmp_path), trials_of(tmp_path, "market-references")
    again = [t for t in trials if t.user_attrs.get("retry_of") == killed.number]
    assert len(again) == 1 and again[0].state.name == "COMPLETE" and again[0].params == killed.params
    assert all(again[0].user_attrs[name] == value for name, value in killed.user_attrs.items() if name.startswith("done/"))
    assert {number: trials[number].value for number in before} == before
    assert len(references) == 3 and {t.state.name for t in references} == {"COMPLETE"}
    assert {t.user_attrs["beat"]["pid"] for t in (*references, *trials)} == {process.pid for process in workers}
    rows = json.loads((tmp_path / "market" / "study.json").read_text())["trials"]
    drawn = [row["params"]["erase"] for row in rows if row["state"] == "finished"]
    assert len(drawn) == len(set(drawn)) == 7 and states({"trials": rows}).count("lost") == 1
    recipe = tmp_path / "market" / "recipe.json"
    assert err.strip().splitlines()[-1].endswith(
        f"retrain MODEL --dataset market --root {market} --recipe {recipe}")
    found = json.loads(out)
    assert found["counts"] == {"finished": 7, "pruned": 0, "failed": 0, "lost": 1} and found["recipe"] == str(recipe)
    for picture in ("tune-history.png", "tune-importance.png"):
        assert (tmp_path / "market" / picture).read_bytes()[:4] == b"\x89PNG"


def kill_in_a_trial(process, out):
    """SIGKILL the process in the middle of a trial of which a part is done; the trial."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        for trial in trials_of(out):
            mine = trial.state.name == "RUNNING" and trial.user_attrs.get("beat", {}).get("pid") == process.pid
            if mine and any(name.startswith("done/") for name in trial.user_attrs):
                process.kill()
                process.wait()
                return trials_of(out)[trial.number]
        time.sleep(0.1)
    raise AssertionError("no trial was seen in the middle")


def test_the_command_in_its_words(market, tmp_path, training, capsys):
    argv = ["tune", *COMMAND, "--root", str(market), "--out", str(tmp_path), "--trials", "7"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "resnet18-stem3-width4" in out and "mean rank" in out and "recipe in" in out
    assert "reference base: mAP resnet18-stem3-width4 " in err and "trial 0 (base): value " in err
    assert err.strip().splitlines()[-1].endswith(
        f"retrain MODEL --dataset market --root {market} --recipe {tmp_path / 'market' / 'recipe.json'}")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["finished"] + found["counts"]["pruned"] == 7 and Path(found["recipe"]).exists()
    training.fails(lambda recipe, epoch: Preempted())
    assert main([*argv, "--study", "stopped", "--overwrite"]) == 0
    again = " ".join(argv[1:] + ["--study", "stopped"])
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"tune {again}")  # joins as it is
    assert main([*argv, "--set", "widht=3"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("autoreid: unknown recipe field 'widht'")


def test_the_help_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name in (*SPACE, *SAMPLERS, *autoreid.tune.PRUNERS, *autoreid.tune.OBJECTIVES):
        assert name in text, name


def test_torch_is_left_as_it_was(market, tmp_path, training):
    """A study's own draws do not depend on torch's generator."""
    torch.manual_seed(5)
    first = study(market, tmp_path / "a", trials=6)["trials"][5]["params"]
    torch.manual_seed(6)
    assert study(market, tmp_path / "b", trials=6)["trials"][5]["params"] == first

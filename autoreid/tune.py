"""Tune the shared recipe with Optuna: a panel of models judges every trial, on training identities that are held out.

A comparison under one recipe is honest only where the recipe was tuned for no one in particular. So a trial trains every
model of the panel by its recipe, on all but one fold of the *training* identities, and is judged on the fold (query and
gallery are never opened). What counts is not the mAP, in which one model's gain would outweigh another's, but where it
stands among the same model's *references*: the recipe that the study starts from and those of the papers, carried over
to its epochs, picture size and batch. They are the first trials of every study. A trial's value is the mean over the
panel; the best of all is chosen by the exact mean rank.

The panel advances together, a third of the epochs at a time, and a trial is pruned between two such rungs only: no model
of the panel speaks before the others. What workers share, and what is left when one is killed: ``autoreid.studies``.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from autoreid import data, parallel, studies
from autoreid.data import Sample
from autoreid.errors import UserError, unknown
from autoreid.evaluate import held_out_split
from autoreid.network import ModelSpec, find_model
from autoreid.options import read_json, require, split_pairs
from autoreid.recipe import WORDS, Recipe, find_recipe
from autoreid.runs import Run, command, commit, environment, folder_name, key_of, say, write_json, write_text
from autoreid.train import Diverged, check_start, fit

SEEDS = ("autoreid", "safr", "robust-reid", "dare")  # the recipes of the papers that every study starts from
PANELS = {  # a searched cell, a ResNet, SAFR and Robust-ReID; for drawn pictures small ones of near sizes
    "drawn": "autoreid-retrieval-reid:channels=16:layers=1x1x1,resnet18:stem=3:width=6,safr-small:width=6,"
             "robust-reid-1x:stem=8:channels=16x24x32:repeats=0x0x0",
    "default": "autoreid-retrieval-reid,resnet50,safr-small,robust-reid-1x",
}
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {  # of the number of a trial's reports
    "median": lambda steps: optuna.pruners.MedianPruner(),
    "hyperband": lambda steps: optuna.pruners.HyperbandPruner(max_resource=steps),
    "none": lambda steps: optuna.pruners.NopPruner(),
}
OBJECTIVES = {"mAP": ("maximize",), "mAP,seconds": ("maximize", "minimize")}
RUNGS = 3  # of a training


# ---------------------------------------------------------------------------------------- what is tuned
@dataclass(frozen=True)
class Axis:
    """One parameter: ``options`` to choose among, or the numbers from ``low`` to ``high``. Where ``needs`` (of the
    recipe's fields as decided so far) is false it would change nothing, and a trial does not have it."""

    options: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    needs: Callable[[Mapping[str, Any]], bool] = lambda recipe: True

    def holding(self, name: str, value: Any) -> Axis:
        """Wide enough for ``value`` too."""
        if self.high == 0:
            return self if value in self.options else replace(self, options=(*self.options, value))
        if self.log and value <= 0:
            raise UserError(f"{name}={value}: it is tuned on a logarithmic scale from {self.low:g} to {self.high:g}; start "
                            f"from a number above 0, or leave {name} out of --fields")
        return replace(self, low=min(self.low, value), high=max(self.high, value))

    def suggest(self, trial: Trial, name: str) -> Any:
        if self.options:
            return trial.suggest_categorical(name, self.options)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


def _triplet(recipe: Mapping[str, Any]) -> bool:
    return recipe["triplet_weight"] > 0


# A name is a field of the recipe, but for warmup_share (of the epochs), schedule (with its milestones, see Space), batch
# (identities x images, as many pictures as the base's batch has) and pad_share (of the height).
SPACE: dict[str, Axis] = {
    "optimizer": Axis(WORDS["optimizer"]),
    "lr": Axis(low=5e-5, high=0.1, log=True),
    "weight_decay": Axis(low=1e-5, high=0.1, log=True),
    "warmup_share": Axis(low=0.0, high=0.3),
    "schedule": Axis(("cosine",)),
    "batch": Axis(),
    "triplet": Axis(WORDS["triplet"], needs=_triplet),
    "soft_margin": Axis((False, True), needs=_triplet),
    "margin": Axis(low=0.1, high=1.0, needs=lambda recipe: _triplet(recipe) and not recipe["soft_margin"]),
    "ce_weight": Axis(low=0.0, high=2.0, needs=_triplet),
    "label_smoothing": Axis(low=0.0, high=0.3, needs=lambda r: r["ce_weight"] > 0 and not r["literal_smoothing"]),
    "flip": Axis((0.0, 0.5)),
    "erase": Axis(low=0.0, high=0.8),
    "pad_share": Axis(low=0.0, high=0.1),
    "jitter": Axis(low=0.0, high=0.5),
    "auto_augment": Axis(WORDS["auto_augment"]),
    "patch": Axis(low=0.0, high=0.5),
    "classifier_dropout": Axis(low=0.0, high=0.5, needs=lambda recipe: recipe["ce_weight"] > 0),
    "drop_path": Axis(low=0.0, high=0.3),
    "ema": Axis((0.0, 0.9, 0.99, 0.999), needs=lambda recipe: not (recipe["swa_epochs"] or recipe["swag_cycles"])),
    "clip": Axis((0.0, 1.0, 10.0)),
}


class Space:
    """What the trials of one study choose: the axes of ``SPACE`` that ``names`` selects, around a base recipe, which
    keeps all else. ``references`` are the recipes known before as parameters, "base" first; the axes hold all of them.

    A schedule is chosen as a whole, with its milestones and factor: "cosine", "cyclic" (three cycles), or one named after
    the reference that it is from. ``identities``: how many there are to train on.
    """

    def __init__(self, base: Recipe, names: Sequence[str], identities: int) -> None:
        for name in names:
            if name not in SPACE:
                raise unknown("field to tune", name, SPACE)
        require(bool(names), "--fields", "", f"one or more of {', '.join(SPACE)}")
        self.base, self.identities = base, identities
        known = {"base": base, **{name: find_recipe(name, {"epochs": base.epochs}) for name in SEEDS}}
        self.schedules: dict[str, dict[str, Any]] = {"cosine": {"schedule": "cosine", "momentum_late": 0.0}}
        if base.epochs > 1:
            cycle = max(2, base.epochs // 3)
            self.schedules["cyclic"] = {"schedule": "cyclic", "momentum_late": 0.0, "cycle_epochs": cycle}
        for name, recipe in known.items():
            if (shape := _schedule(recipe)) not in self.schedules.values():
                self.schedules[name] = shape
        sizes = [base.identities * base.images // images for images in (2, 4, 8)]
        own = {"schedule": tuple(self.schedules), "batch": tuple(
            f"{size}x{images}" for size, images in zip(sizes, (2, 4, 8), strict=True) if self._fits(size, images))}
        self.axes = {name: replace(axis, options=own.get(name, axis.options))
                     for name, axis in SPACE.items() if name in names}
        self.references: dict[str, dict[str, Any]] = {}
        for name, recipe in known.items():
            params = self.params_of(self.recipe_of(self.params_of(recipe)))  # whole epochs and pixels, back as shares
            if params not in self.references.values():
                self.references[name] = params
                self.axes |= {key: self.axes[key].holding(key, value) for key, value in params.items()}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The trial's parameters."""
        return self._walk(lambda name: self.axes[name].suggest(trial, name))

    def params_of(self, recipe: Recipe) -> dict[str, Any]:
        """The parameters that stand for a recipe, carried over to the base's epochs, picture size and batch size."""
        base, weight = self.base, recipe.ce_weight
        if recipe.triplet_weight not in (0, base.triplet_weight):  # the two weights' proportion is what counts
            weight *= base.triplet_weight / recipe.triplet_weight
        size = base.identities * base.images // recipe.images
        values = {
            "warmup_share": recipe.warmup_epochs / recipe.epochs, "pad_share": recipe.pad / recipe.input[0],
            "ce_weight": weight,
            "schedule": next((name for name, shape in self.schedules.items() if shape == _schedule(recipe)), None),
            "batch": f"{size}x{recipe.images}" if self._fits(size, recipe.images) else f"{base.identities}x{base.images}",
        }
        return self._walk(lambda name: values[name] if name in values else getattr(recipe, name))

    def recipe_of(self, params: Mapping[str, Any]) -> Recipe:
        """The base with these parameters."""
        changes: dict[str, Any] = {}
        for name, value in params.items():
            changes |= self._fields(name, value)
        return replace(self.base, **changes)

    def reference(self, params: Mapping[str, Any]) -> str | None:
        """The name of the reference with these parameters."""
        return next((name for name, known in self.references.items() if known == params), None)

    def _walk(self, choose: Callable[[str], Any]) -> dict[str, Any]:
        """The parameters in the order of SPACE, each chosen where the ones before leave it something to change."""
        recipe, params = asdict(self.base), {}
        for name, axis in self.axes.items():
            if axis.needs(recipe):
                params[name] = choose(name)
                recipe |= self._fields(name, params[name])
        return params

    def _fields(self, name: str, value: Any) -> dict[str, Any]:
        """The recipe's fields that a parameter decides."""
        base = self.base
        if name == "lr":
            return {"lr": value, "lr_min": min(base.lr_min, value)}
        if name == "warmup_share":
            return {"warmup_epochs": round(value * base.epochs)}
        if name == "pad_share":
            return {"pad": round(value * base.input[0])}
        if name == "schedule":
            return self.schedules[value]
        if name == "batch":
            return dict(zip(("identities", "images"), map(int, value.split("x")), strict=True))
        return {name: value}

    def _fits(self, identities: int, images: int) -> bool:
        base = self.base
        return identities * images == base.identities * base.images and 2 <= identities <= self.identities and images >= 2


def _schedule(recipe: Recipe) -> dict[str, Any]:
    """The fields that make a recipe's schedule, without those that do not matter to it."""
    matter = {"cosine": (), "cyclic": ("cycle_epochs",), "step": ("milestones", "gamma"),
              "exponential": ("milestones", "gamma")}[recipe.schedule]
    late = ("milestones",) if recipe.momentum_late > 0 else ()
    return {name: getattr(recipe, name) for name in ("schedule", "momentum_late", *matter, *late)}


# ---------------------------------------------------------------------------------------- who judges
def identity_folds(samples: Sequence[Sample], folds: int, seed: int) -> list[tuple[list[Sample], list[Sample]]]:
    """(to train on, to judge on) for each fold of the identities, whose order is drawn by ``seed``: every identity is held
    out once. With one fold a third of them is held out. Raises UserError: too few identities or pictures of them."""
    require(folds >= 1, "--folds", folds, "1 (a third of the identities is held out) or more")
    identities = sorted({sample.identity for sample in samples})
    order = np.random.default_rng([seed, folds]).permutation(identities)
    parts = np.array_split(order, folds) if folds > 1 else [order[: len(order) // 3]]
    found = []
    for number, part in enumerate(parts):
        held = {int(identity) for identity in part}
        split = ([s for s in samples if s.identity not in held], [s for s in samples if s.identity in held])
        if len(held) < 2 or not held_out_split(split[1])[0]:
            raise UserError(
                f"--folds {folds}: fold {number} holds out {len(held)} of {len(identities)} identities, and none can be "
                "asked for: each fold needs two or more, one of them seen by two cameras (or, without cameras, twice); "
                "give fewer folds or more training images"
            )
        found.append(split)
    return found


def find_panel(text: str) -> tuple[ModelSpec, ...]:
    """The models of ``NAME,NAME,...``: what ``find_model`` knows, each with its options behind colons, a list's numbers
    with x between them (``resnet18:width=8,darts-v2:layers=1x1``)."""
    specs = []
    for word in text.split(","):
        name, *options = word.strip().split(":")
        if not name or not all("=" in option for option in options):
            raise UserError(f"--panel {text}: give models by NAME or NAME:key=value:..., with commas between them, as in "
                            "resnet18:width=8,safr-small")
        specs.append(find_model(name, split_pairs(options)))
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--panel {text}: {label} is in it twice, and would count twice; name it once")
    return tuple(specs)


class _AtRung(Exception):
    """The training has come to its rung: its checkpoint is where it goes on."""


@dataclass(frozen=True)
class Panel:
    """The models that judge, and what they are trained and judged on."""

    specs: tuple[ModelSpec, ...]
    parts: Sequence[tuple[Sequence[Sample], Sequence[Sample]]]
    folder: Path
    asked: str
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    cache: str | None = None

    @property
    def labels(self) -> list[str]:
        return [spec.label for spec in self.specs]

    @property
    def identities(self) -> int:
        """How many every fold leaves to train on."""
        return min(len({s.identity for s in train}) for train, _ in self.parts)

    def watched(self, recipe: Recipe) -> Recipe:
        """The recipe of a trial's trainings: evaluated at every rung."""
        every = math.ceil(recipe.all_epochs / RUNGS)
        return replace(recipe, held_out=1 / (len(self.parts) if len(self.parts) > 1 else 3), eval_every=every)

    def rungs(self, recipe: Recipe) -> list[int]:
        """The epochs, from 1, at which a training is judged."""
        every = self.watched(recipe).eval_every
        return [*range(every, recipe.all_epochs, every), recipe.all_epochs]

    @contextmanager
    def home(self, trial: Trial) -> Iterator[Path]:
        """The folder of a trial's trainings. It goes when the trial is over; it stays where a worker only stops, for the
        one that takes the trial over."""
        name = trial.user_attrs.get("folder") or f"{trial.study.study_name}-{trial.number}-{self.asked}"
        trial.set_user_attr("folder", name)
        try:
            yield self.folder / name
        except (optuna.TrialPruned, Diverged, MemoryError, RuntimeError):  # torch's lack of memory is a RuntimeError
            shutil.rmtree(self.folder / name, ignore_errors=True)
            raise
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def judge(self, trial: Trial, recipe: Recipe, folder: Path) -> Iterator[dict[str, float]]:
        """Train the panel by a recipe, all models of a fold to the next rung before any goes further; at each rung every
        model's mAP on the fold, a mean with the folds before it.

        What a training gave stays with the trial as user attribute ``done/<model>/<fold>/<epoch>``, and its state in
        ``folder``: a worker that takes the trial over goes on from both. Raises Diverged.
        """
        recipe = self.watched(recipe)
        before: dict[str, list[float]] = {label: [] for label in self.labels}
        for fold in range(len(self.parts)):
            for epoch in self.rungs(recipe):
                now = {spec.label: self._train(trial, recipe, spec, fold, epoch, folder) for spec in self.specs}
                yield {label: statistics.fmean([*before[label], mAP]) for label, mAP in now.items()}
            before = {label: [*before[label], mAP] for label, mAP in now.items()}

    def _train(self, trial: Trial, recipe: Recipe, spec: ModelSpec, fold: int, until: int, folder: Path) -> float:
        """The mAP of a model on a fold after the epoch ``until``."""
        name = f"done/{spec.label}/{fold}/{until}"
        if name in trial.user_attrs:
            return trial.user_attrs[name]["mAP"]
        seen = math.nan

        def report(epoch: int, mAP: float) -> None:
            nonlocal seen
            seen = mAP
            if until <= epoch < recipe.all_epochs:
                raise _AtRung

        train, held_out = self.parts[fold]
        seed, seconds = 1000 * self.seed + fold, None
        config = {"model": spec.label, "fold": fold, "recipe": recipe.question(), "seed": seed}
        run = Run(folder / f"{spec.label}-f{fold}", config, resume=True, overwrite=False)
        torch.manual_seed(seed)
        try:
            net = spec.build(recipe.drop_path)
            training = fit(net, train, recipe, run, seed, self.device, self.workers, self.cache, held_out, report)
            seconds = training.seconds
        except _AtRung:
            pass
        except Diverged as fault:
            raise Diverged(f"{spec.label}, fold {fold}: {fault}") from None
        trial.set_user_attr(name, {"mAP": seen, "seconds": seconds})
        if until == recipe.all_epochs:
            shutil.rmtree(run.folder, ignore_errors=True)
        return seen


def training_seconds(trial: Trial | FrozenTrial) -> float:
    """Of all of a trial's finished trainings."""
    done = [value for name, value in trial.user_attrs.items() if name.startswith("done/")]
    return sum(value["seconds"] or 0.0 for value in done)


# ---------------------------------------------------------------------------------------- what a trial is worth
def normalised_rank(mAP: float, references: Sequence[float]) -> float:
    """Where an mAP stands among the references', from 0 to 1: the i-th of n stands at i / (n + 1), equal ones at their
    mean, and between them, and on to 0 at mAP 0 and to 1 at mAP 1, it goes in straight lines. So it rises with the mAP
    everywhere, and a model with a wide spread counts no more than one with a narrow."""
    x, y = [0.0], [0.0]
    for value, group in groupby(enumerate(sorted(references), start=1), key=lambda numbered: numbered[1]):
        if 0 < value < 1:
            x.append(value)
            y.append(statistics.fmean(i for i, _ in group) / (len(references) + 1))
    return float(np.interp(mAP, [*x, 1.0], [*y, 1.0]))


def mean_ranks(mAPs: Sequence[Mapping[str, float]]) -> list[float]:
    """The rank of each trial among all, 1 the best, equal ones at their mean; a mean over the models."""
    return pd.DataFrame(list(mAPs)).rank(ascending=False).mean(axis=1).tolist() if mAPs else []


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of each parameter in reaching the best quarter of the finished trials (PED-ANOVA, Watanabe et al. 2023),
    highest first, 1 together; {} where there is nothing to tell yet. Of two objectives the first."""
    if sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each says that there are few trials
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25), normalize=False,
            target=(lambda trial: -trial.values[0]) if len(study.directions) > 1 else None,
        )
    total = sum(found.values())
    shares = {name: value / total for name, value in found.items()} if total > 0 else {}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


class PerTrial(optuna.samplers.BaseSampler):
    """A sampler made anew for every trial, with a seed drawn from the study's and the trial's number: two workers draw
    different parameters, and a study of one worker can be repeated."""

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> None:
        self._make, self._seed, self._now = make, seed, make(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._now = self._make(int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]))
        self._now.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._now.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._now.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._now.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._now.after_trial(study, trial, state, values)


# ---------------------------------------------------------------------------------------- the study
def tune(
    dataset: str,
    base: Recipe,
    panel: str,
    out: str | Path,
    *,
    root: str | None = None,
    trials: int = 40,
    tuned: Sequence[str] = tuple(SPACE),
    folds: int = 2,
    sampler: str = "tpe",
    pruner: str | None = None,
    objectives: str = "mAP",
    storage: str | None = None,
    name: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    cache: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Join the study ``name`` (default the dataset's), or start it, work until ``trials`` of it are finished, and write
    ``<out>/<dataset>/recipe.json``, study.json and study.csv. Returns what study.json holds.

    Raises UserError: anything that does not exist or does not fit, a study that asks another question, a recipe.json of
    another study, no trial that was finished.
    """
    for what, given, known in (("sampler", sampler, SAMPLERS), ("objectives", objectives, OBJECTIVES)):
        if given not in known:
            raise unknown(what, given, known)
    directions = OBJECTIVES[objectives]
    pruner = pruner or ("median" if len(directions) == 1 else "none")
    if pruner not in PRUNERS:
        raise unknown("pruner", pruner, PRUNERS)
    if len(directions) > 1 and pruner != "none":
        raise UserError(f"--pruner {pruner}: two objectives give no one value to prune by; give --pruner none, or "
                        "--objectives mAP")
    tuned = tuple(dict.fromkeys(tuned))
    specs, name = find_panel(panel), folder_name(dataset) if name is None else name
    require(bool(re.fullmatch(r"[\w.+-]+", name)), "--study", name, "letters, digits, '.', '_', '+' and '-'")
    for spec in specs:
        check_start(spec, base, "scratch")
    samples = list(data.load(dataset, root, parts=("train",)).train)
    parts = identity_folds(samples, folds, seed)
    asked = {
        "dataset": dataset, "train_images": len(samples), "folds": folds, "seed": seed, "sampler": sampler,
        "pruner": pruner, "objectives": objectives, "fields": sorted(tuned),
        "panel": {s.label: key_of({**s.to_dict(), "genotype": s.genotype and s.genotype.key()}) for s in specs},
        "recipe": base.question(), "device": parallel.kind(device),
    }
    folder = Path(out) / folder_name(dataset)
    jury = Panel(specs, parts, folder / "tune" / name, key_of(asked), seed, device, workers, cache)
    if base.identities > jury.identities:
        raise UserError(f"identities={base.identities}: the folds leave {jury.identities} identities to train on; give "
                        f"--set identities={jury.identities} or fewer, or more --folds")
    space = Space(base, tuned, jury.identities)
    require(trials >= len(space.references), "--trials", trials,
            f"{len(space.references)} or more: the references are the first ({', '.join(space.references)})")
    _refuse_another(folder / "recipe.json", name, asked, overwrite)

    shared, place = studies.open_storage(storage, jury.folder)
    study = studies.open_study(
        name, shared, asked, directions=directions, sampler=PerTrial(SAMPLERS[sampler], seed),
        pruner=PRUNERS[pruner](folds * len(jury.rungs(base))),
    )
    table = _references(space, jury, shared, f"{name}-references", asked)
    if "references" not in study.user_attrs:
        study.set_user_attr("references", table)
    for params in space.references.values():
        studies.enqueue(study, params)

    def objective(trial: Trial) -> float | tuple[float, float]:
        value = judged(trial, space, jury, table, prunes=len(directions) == 1)
        return value if len(directions) == 1 else (value, trial.user_attrs["seconds"])

    begin = time.monotonic()
    studies.work(study, objective, wanted=trials, survives=(Diverged,), on_trial=lambda trial: say(_line(trial, study)))
    _refuse_another(folder / "recipe.json", name, asked, overwrite)
    found = outcome(study, place, asked, table)
    write_json(folder / "study.json", {**found, "worked_seconds": time.monotonic() - begin, "environment": environment()})
    write_text(folder / "study.csv", table_of(found))
    if found["best"] is None:
        reasons = "; ".join(row["reason"] for row in found["trials"] if row["reason"])
        raise UserError(f"study {name}: none of its trials was finished, so there is no recipe ({reasons}); start from "
                        "another --recipe in another --study NAME")
    space.recipe_of(found["best"]["params"]).to_file(folder / "recipe.json", _provenance(found))
    return found


def judged(
    trial: Trial, space: Space, jury: Panel, table: Mapping[str, Mapping[str, Any]], prunes: bool
) -> float:
    """The value of a trial: its panel's mAPs by where they stand among the references' in ``table``, a mean. The mAPs and
    the seconds of training stay with it. A reference was trained before, and is not pruned."""

    def value_of(mAPs: Mapping[str, float]) -> float:
        return statistics.fmean(normalised_rank(mAPs[label], [reference["mAP"][label] for reference in table.values()])
                                for label in jury.labels)

    params = space.suggest(trial)
    name = space.reference(params)
    trial.set_user_attr("reference", name)
    if name is not None:
        if table[name]["reason"]:
            raise Diverged(table[name]["reason"])
        steps, seconds = table[name]["steps"], table[name]["seconds"]
        for step, mAPs in enumerate(steps if prunes else (), start=1):
            trial.report(value_of(mAPs), step)
            trial.should_prune()  # hyperband keeps its books in this call
    else:
        steps = []
        with jury.home(trial) as folder:
            for mAPs in jury.judge(trial, space.recipe_of(params), folder):
                steps.append(mAPs)
                if prunes:
                    trial.report(value_of(mAPs), len(steps))
                    if trial.should_prune():
                        raise optuna.TrialPruned
        seconds = training_seconds(trial)
    trial.set_user_attr("mAP", steps[-1])
    trial.set_user_attr("seconds", seconds)
    return value_of(steps[-1])


def _references(space: Space, jury: Panel, storage: Any, name: str, asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What every reference gave: ``steps`` (each model's mAP, rung by rung), ``mAP`` (the last of them; 0 for one that
    failed), ``seconds``, ``params`` and ``reason`` (why it failed, or None).

    They are trials of a study of their own, as their values in the study itself depend on all of them.
    """
    study = studies.open_study(name, storage, asked)
    for reference, params in space.references.items():
        studies.enqueue(study, params, reference=reference)

    def measure(trial: Trial) -> float:
        recipe = space.recipe_of(space.suggest(trial))
        with jury.home(trial) as folder:
            steps = list(jury.judge(trial, recipe, folder))
        trial.set_user_attr("steps", steps)
        return statistics.fmean(steps[-1].values())

    def told(trial: FrozenTrial) -> None:
        named = f"reference {trial.user_attrs['reference']}"
        say(f"{named}: {_shown(trial.user_attrs['steps'][-1])}" if trial.state == TrialState.COMPLETE
            else f"{named} failed: {trial.user_attrs['reason']}")

    studies.work(study, measure, wanted=None, survives=(Diverged,), on_trial=told)
    table = {}
    for trial in studies.finished(study):
        done, steps = trial.user_attrs, trial.user_attrs.get("steps", [])
        table[done["reference"]] = {
            "mAP": steps[-1] if steps else dict.fromkeys(jury.labels, 0.0), "steps": steps, "params": trial.params,
            "seconds": training_seconds(trial), "reason": None if steps else done["reason"],
        }
    return {reference: table[reference] for reference in space.references}


def _refuse_another(path: Path, name: str, asked: Mapping[str, Any], overwrite: bool) -> None:
    """A recipe.json that this study did not write stays, unless the user says otherwise."""
    if overwrite or not path.exists():
        return
    recipe = read_json(path, "recipe")
    before = recipe.get("provenance", {}) if isinstance(recipe, dict) else {}
    if (before.get("study"), before.get("question")) != (name, key_of(asked)):
        whose = f" (study {before['study']}, {before.get('command')})" if "study" in before else ""
        raise UserError(f"{path} was not written by this study{whose}: add --overwrite to replace it, or write elsewhere "
                        "with --out DIR")


# ---------------------------------------------------------------------------------------- what came out
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running",
          TrialState.WAITING: "waiting"}


def outcome(
    study: optuna.Study, place: str, asked: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All trials, the best of them and the Pareto front (of one objective: the best), as study.json holds them.

    The best has the lowest exact mean rank over all finished trials; of equal ones that with the higher value.
    """
    rows: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False):
        if "void" in trial.user_attrs:
            continue
        done = trial.user_attrs
        finished = trial.state == TrialState.COMPLETE
        rows.append({
            "number": trial.number, "state": STATES.get(trial.state, "failed" if "reason" in done else "lost"),
            "reference": done.get("reference"), "value": trial.values[0] if finished else None,
            "seconds": done["seconds"] if finished else None, "mean_rank": None, "best_value": None,
            "steps": list(trial.intermediate_values.values()), "mAP": done["mAP"] if finished else None,
            "params": trial.params, "reason": done.get("reason"),
            "took": trial.duration.total_seconds() if trial.duration else None,
        })
    complete = [row for row in rows if row["state"] == "finished"]
    for row, rank in zip(complete, mean_ranks([row["mAP"] for row in complete]), strict=True):
        row["mean_rank"] = rank
    highest = None
    for row in rows:
        highest = max((value for value in (highest, row["value"]) if value is not None), default=None)
        row["best_value"] = highest
    best = min(complete, key=lambda row: (row["mean_rank"], -row["value"], row["number"]), default=None)
    counted = {state: sum(row["state"] == state for row in rows) for state in ("finished", "pruned", "failed", "lost")}
    return {
        "format": "autoreid-study", "version": 1, "study": study.study_name, "storage": place, "question": key_of(asked),
        "asked": dict(asked), "counts": counted, "best": best, "highest_value": max(
            complete, key=lambda row: row["value"], default={"number": None})["number"],
        "front": sorted(trial.number for trial in study.best_trials) if complete else [],
        "base": next((row for row in rows if row["reference"] == "base" and row["state"] == "finished"), None),
        "references": {name: dict(row) for name, row in table.items()}, "importance": importances(study), "trials": rows,
    }


def table_of(found: Mapping[str, Any]) -> str:
    """The trials as CSV: a column for every model's mAP and every parameter."""
    labels, names = list(found["asked"]["panel"]), [name for name in SPACE if name in found["asked"]["fields"]]
    plain = ("number", "state", "reference", "value", "mean_rank", "seconds", "took", "reason")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(f"mAP {label}" for label in labels), *names])
    for row in found["trials"]:
        writer.writerow([*(row[name] for name in plain), *((row["mAP"] or {}).get(label) for label in labels),
                         *(row["params"].get(name) for name in names)])
    return text.getvalue()


def _provenance(found: Mapping[str, Any]) -> dict[str, Any]:
    """Where a recipe.json is from, and what its panel gained."""
    best, base = found["best"], found["references"]["base"]
    return {
        "command": command(), "commit": commit(), "study": found["study"], "question": found["question"],
        "storage": found["storage"], "dataset": found["asked"]["dataset"], "trial": best["number"],
        "reference": best["reference"], "trials": found["counts"], "fields": found["asked"]["fields"],
        "folds": found["asked"]["folds"], "seed": found["asked"]["seed"], "panel": list(found["asked"]["panel"]),
        "mean_rank": {"best": best["mean_rank"], "base": found["base"] and found["base"]["mean_rank"]},
        "value": {"best": best["value"], "base": found["base"] and found["base"]["value"]},
        "mAP": {"best": best["mAP"], "base": base["mAP"]},
    }


def summary(found: Mapping[str, Any], path: str | Path) -> str:
    """For people: each model under the base and under the best."""
    best, base, counts = found["best"], found["references"]["base"], found["counts"]
    wide = max(map(len, best["mAP"])) + 1
    lines = [f"{'model':{wide}} {'base':>7} {'best':>7}   mAP on held-out training identities"]
    lines += [f"{label:{wide}} {100 * base['mAP'][label]:6.1f}% {100 * mAP:6.1f}%" for label, mAP in best["mAP"].items()]
    rank = f"{found['base']['mean_rank']:.1f}" if found["base"] else "failed"
    lines.append(f"{'mean rank':{wide}} {rank:>7} {best['mean_rank']:7.1f}   among {counts['finished']} finished trials "
                 f"({counts['pruned']} pruned, {counts['failed']} failed)")
    named = f" ({best['reference']})" if best["reference"] else ""
    lines.append(f"best: trial {best['number']}{named}; recipe in {path}")
    return "\n".join(lines)


def _line(trial: FrozenTrial, study: optuna.Study) -> str:
    """One trial for the log."""
    done = trial.user_attrs
    named = f"trial {trial.number}" + (f" ({done['reference']})" if done.get("reference") else "")
    if trial.state == TrialState.COMPLETE:
        return f"{named}: value {trial.values[0]:.3f}, {_shown(done['mAP'])}, {done['seconds']:.0f} s of training"
    if trial.state == TrialState.PRUNED:
        last = max(trial.intermediate_values, default=0)
        return f"{named}: pruned at report {last}, value {trial.intermediate_values.get(last, math.nan):.3f}"
    return f"{named} failed: {done.get('reason')}"


def _shown(mAPs: Mapping[str, float]) -> str:
    return "mAP " + ", ".join(f"{label} {100 * mAP:.1f} %" for label, mAP in mAPs.items())

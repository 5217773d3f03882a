"""Sweeps: models x datasets x seeds under one recipe, declared in one file, run by as many workers as join.

A sweep is a queue of trainings in a study (``autoreid.studies``): every worker reads the file, queues what is not queued
yet, and takes one job after the other until all are done. A job is ``train.retrain`` with ``resume``: a job whose worker
was killed goes on from its checkpoint, and a finished result that answers the same question is not made again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from autoreid import data, studies
from autoreid.errors import UserError, unknown
from autoreid.evaluate import Evaluation
from autoreid.network import ModelSpec, find_model
from autoreid.options import read_json, require
from autoreid.recipe import Recipe, find_recipe
from autoreid.runs import folder_name, forget_peak_memory, key_of, say
from autoreid.train import check_start, retrain

REQUIRED = ("models", "datasets", "recipe")
DEFAULTS: dict[str, Any] = {
    "seeds": [0], "set": {}, "test": None, "views": 1, "rerank": None, "expand": None, "denominator": "scored",
    "frames": "mean", "skip_unreadable": False,
}
OF_A_MODEL: dict[str, Any] = {"model": "", "set": {}, "match": None, "init": "scratch", "name": None}
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "seeds": (list, "a list of whole numbers, as in [0, 1, 2]"), "datasets": (list, 'a list of names, as in ["market"]'),
    "models": (list, 'a list of names or objects, as in ["resnet50", {"model": "resnet18", "set": {"width": 20}}]'),
    "recipe": (str, "a name or a JSON file, as in default"), "set": (dict, 'an object of fields, as in {"epochs": 60}'),
    "test": ((str, type(None)), "a dataset's name or null"), "views": (int, "1, 2 or 10"),
    "rerank": ((list, type(None)), "[K1, K2, LAMBDA] as in [20, 6, 0.3], or null"),
    "expand": ((list, type(None)), "[K, ALPHA] as in [10, 3], or null"), "denominator": (str, "scored or all"),
    "frames": (str, "mean or max"), "skip_unreadable": (bool, "true or false"), "model": (str, "a name or a genotype file"),
    "match": ((str, type(None)), "a genotype file or null"), "init": (str, "scratch, imagenet or a file"),
    "name": ((str, type(None)), "letters, digits, '.', '_' and '-', or null"),
}
INSTEAD = ("give the sweep's file and --out other names, so that both remain, or take the old results and the journal away")


# ---------------------------------------------------------------------------------------- the file
@dataclass(frozen=True)
class Job:
    """One training of a sweep. ``folder`` is where its result goes, ``name`` and the seed its file's name."""

    spec: ModelSpec
    init: str
    name: str
    dataset: str
    seed: int
    folder: str

    @property
    def key(self) -> str:
        """Twelve digits that stand for what a sweep's jobs differ in."""
        genotype = self.spec.genotype.key() if self.spec.genotype else None  # where it came from is not the question
        return key_of([{**self.spec.to_dict(), "genotype": genotype}, self.init, self.name, self.dataset, self.seed])

    def __str__(self) -> str:
        return f"{self.name} on {self.dataset}, seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file asks for."""

    name: str
    jobs: tuple[Job, ...]
    recipe: Recipe
    test: str | None
    how: Evaluation

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """The sweep in a JSON file: every model with every dataset and seed.

        Raises UserError that names the file and the fault: an unknown key, a value of another kind, an empty list, a name
        that is not known, two jobs that would write the same result. Datasets are not opened: see :meth:`check`.
        """
        try:
            return cls._of(Path(path).stem, read_json(path, "sweep"))
        except UserError as fault:
            raise UserError(str(fault) if str(fault).startswith(f"{path}: ") else f"{path}: {fault}") from None

    @classmethod
    def _of(cls, name: str, given: Any) -> Sweep:
        asked = _checked("sweep", given, DEFAULTS, REQUIRED)
        for key in ("models", "datasets", "seeds"):
            require(bool(asked[key]), key, "[]", "a list with at least one entry")
        for seed in asked["seeds"]:
            require(type(seed) is int and 0 <= seed < 2**31, "seeds", seed, f"whole numbers from 0 to {2**31 - 1}")
        for dataset in [*asked["datasets"], *([asked["test"]] if asked["test"] else [])]:
            require(type(dataset) is str, "datasets", dataset, "names")
            data.split(dataset)
        how = Evaluation(
            asked["views"], asked["frames"], _numbers("rerank", asked["rerank"], (int, int, float)),
            _numbers("expand", asked["expand"], (int, float)), asked["denominator"], asked["skip_unreadable"],
        )
        test, jobs = asked["test"], []
        for entry in asked["models"]:
            model = _checked("model", {"model": entry} if isinstance(entry, str) else entry, OF_A_MODEL, ("model",))
            spec = find_model(model["model"], model["set"], model["match"])
            for dataset in asked["datasets"]:
                require(model["name"] is None or bool(re.fullmatch(r"[\w.-]+", model["name"])), "name", model["name"],
                        "letters, digits, '.', '_' and '-'")
                label = model["name"] or spec.label + (f"-from-{folder_name(dataset)}" if test else "")
                jobs += [Job(spec, model["init"], label, dataset, seed, folder_name(test or dataset))
                         for seed in asked["seeds"]]
        for i, job in enumerate(jobs):
            for other in jobs[:i]:
                if (job.folder, job.name, job.seed) == (other.folder, other.name, other.seed):
                    raise UserError(f"'{other}' and '{job}' would write the same result: take one away, or give a model "
                                    'another name, as in {"model": "resnet50", "name": "resnet50-b"}')
        return cls(name, tuple(jobs), find_recipe(asked["recipe"], asked["set"]), test, how)

    def check(self, root: str | None) -> None:
        """Raise the UserError that a job of this sweep would meet before it trains: a dataset that is not there, a network
        that cannot take the pictures or the weights to start from, an evaluation that the protocol does not have."""
        for dataset in {job.dataset: None for job in self.jobs}:
            protocol = data.load(dataset, root, parts=("train",) if self.test else data.PARTS).protocol
            self.how.check(data.load(self.test, root, parts=("query", "gallery")).protocol if self.test else protocol)
        for spec, init in {key_of([job.spec.to_dict(), job.init]): (job.spec, job.init) for job in self.jobs}.values():
            check_start(spec, self.recipe, init)


def _checked(what: str, given: Any, defaults: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """An object of the file with its defaults, every value of the kind that it must be."""
    if not isinstance(given, dict):
        raise UserError(f"a {what} is a JSON object of {', '.join(required)} and more, got {type(given).__name__}")
    for key, value in given.items():
        if key not in (*defaults, *required):
            raise unknown(f"{what} field", key, {*defaults, *required})
        kind, allowed = KINDS[key]
        require(isinstance(value, kind) and (kind is bool or type(value) is not bool), key, value, allowed)
    for key in required:
        if key not in given:
            raise UserError(f"{key} is missing: give {KINDS[key][1]}")
    return {**defaults, **given}


def _numbers(name: str, given: Sequence[Any] | None, kinds: Sequence[type]) -> Any:
    if given is None:
        return None
    require(len(given) == len(kinds) and all(type(v) in ((int,) if kind is int else (int, float))
                                             for v, kind in zip(given, kinds, strict=True)), name, given, KINDS[name][1])
    return tuple(kind(value) for kind, value in zip(kinds, given, strict=True))


# ---------------------------------------------------------------------------------------- the worker
def run(
    sweep: Sweep,
    out: str | Path,
    *,
    root: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    workers: int = 0,
    cache: str | None = None,
    retry: bool = False,
) -> list[dict[str, Any]]:
    """Work on a sweep until all its jobs are done, by this worker or others; how each ended, as :func:`states` says.

    ``out``, ``root``, ``device``, ``workers`` and ``cache`` are ``train.retrain``'s. ``storage``: see
    ``studies.open_storage``; by default ``<out>/<sweep's name>.journal``. A job that fails is recorded and the others go
    on; ``retry`` queues the failed ones again.
    """
    sweep.check(root)
    if device.startswith("cuda:"):  # which of its GPUs a worker has is not the question: another may go on with a job
        torch.cuda.set_device(device)
        device = "cuda"
    kept, shown = studies.open_storage(storage, out, f"{sweep.name}.journal")
    study = studies.open_study(
        f"sweep-{sweep.name}", kept,
        {"recipe": sweep.recipe.question(), "test": sweep.test, "evaluation": sweep.how.to_dict(),
         "skip_unreadable": sweep.how.skip_unreadable, "device": device},
        sampler=optuna.samplers.RandomSampler(), instead=INSTEAD,
    )
    jobs = {job.key: job for job in sweep.jobs}
    say(f"{len(jobs)} jobs in {shown}; start the same command again, here or elsewhere, for one more worker")
    ended = {key: trial for key, trial in _latest(study).items() if trial.state == TrialState.FAIL}
    for key, job in jobs.items():
        studies.enqueue(study, {}, once=key, job=key, label=str(job))
        if retry and key in ended:
            studies.enqueue(study, {}, once=f"{key} after {ended[key].number}", job=key, label=str(job))

    def train(trial: Trial) -> float:
        job = jobs[trial.user_attrs["job"]]
        say(f"{job}: starts")
        forget_peak_memory()
        path, result = retrain(
            job.spec, job.dataset, sweep.recipe, out, root=root, test=sweep.test, seed=job.seed, device=device,
            workers=workers, how=sweep.how, init=job.init, cache=cache, resume=True, name=job.name,
        )
        trial.set_user_attr("result", str(path))
        return result["mAP"]

    def tell(trial: FrozenTrial) -> None:
        left = sum(state["state"] in ("waiting", "running") for state in studies.patiently(lambda: _states(sweep, study)))
        say(f"{jobs[trial.user_attrs['job']]}: {_words(trial)}; {left} of {len(jobs)} jobs left")

    studies.work(study, train, wanted=None, on_trial=tell, survives=(UserError,),
                 mine=lambda trial: trial.user_attrs.get("job") in jobs)
    return studies.patiently(lambda: _states(sweep, study))


# ---------------------------------------------------------------------------------------- where it stands
def states(sweep: Sweep, out: str | Path, storage: str | None = None) -> list[dict[str, Any]]:
    """Of every job ``job``, ``model``, ``dataset``, ``seed``, ``state`` (waiting, running, finished or failed), ``text``
    (host, mAP or reason, for people), ``mAP`` and ``result`` (the path). Nothing is made or changed."""
    if storage is None and not (Path(out) / f"{sweep.name}.journal").exists():
        return _states(sweep, None)
    kept, _ = studies.open_storage(storage, out, f"{sweep.name}.journal")
    try:
        return _states(sweep, optuna.load_study(study_name=f"sweep-{sweep.name}", storage=kept))
    except KeyError:
        return _states(sweep, None)


def _states(sweep: Sweep, study: optuna.Study | None) -> list[dict[str, Any]]:
    latest = _latest(study) if study else {}
    return [
        {"job": str(job), "model": job.name, "dataset": job.dataset, "seed": job.seed, "state": _state(latest.get(job.key)),
         "text": _words(latest.get(job.key)), "mAP": (found := latest.get(job.key)) and found.value,
         "result": found and found.user_attrs.get("result")}
        for job in sweep.jobs
    ]


def _latest(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The last trial of every job."""
    return {trial.user_attrs["job"]: trial for trial in studies.trials(study)}


def _state(trial: FrozenTrial | None) -> str:
    if trial is None or trial.state == TrialState.WAITING:
        return "waiting"
    if trial.state == TrialState.FAIL:
        return "failed" if "reason" in trial.user_attrs else "waiting"  # lost, and to be queued again
    return {TrialState.RUNNING: "running", TrialState.COMPLETE: "finished"}[trial.state]


def _words(trial: FrozenTrial | None) -> str:
    state = _state(trial)
    if trial is None or state == "waiting":
        return "waiting"
    if state == "running":
        beat = trial.user_attrs.get("beat")
        return f"running on {beat['host']}, process {beat['pid']}" if beat else "running"
    if state == "finished":
        return f"finished: mAP {100 * trial.values[0]:.1f} %"
    return f"failed: {trial.user_attrs['reason']}"

"""Sweeps: what a file may say, each job once, failures, and real workers of the command, one of them killed in mid-job."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import planted
import pytest
from postgres import Server

from autoreid import runs, studies, sweep
from autoreid.cli import main
from autoreid.errors import UserError
from autoreid.sweep import Sweep
from autoreid.train import Diverged, retrain

ROOT = Path(__file__).parent.parent
SMALL = {"input": [32, 16], "identities": 4, "images": 3, "pad": 2, "warmup_epochs": 0, "epochs": 1}
TINY = {"model": "resnet18", "set": {"width": 4, "stem": 3}, "name": "tiny"}
OTHER = {"model": "resnet18", "set": {"width": 5, "stem": 3}}
FILE = {"models": [TINY, OTHER], "datasets": ["market"], "seeds": [0, 1], "recipe": "drawn", "set": SMALL}
JOBS = ["tiny on market, seed 0", "tiny on market, seed 1", "resnet18-stem3-width5 on market, seed 0",
        "resnet18-stem3-width5 on market, seed 1"]


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=10, test_identities=4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "POLL_S", 0.05)
    return tmp_path


def write(changes=None, name="panel.json", **more):
    Path(name).write_text(json.dumps({**FILE, **(changes or {}), **more}))
    return name


class Trained(list):
    """The jobs that would have been trained, in their order; nothing is. ``faults``: what is raised for a name."""

    def __init__(self):
        super().__init__()
        self.faults = {}

    def __call__(self, spec, dataset, recipe, out, *, seed, name, **options):
        self.append((name, dataset, seed))
        if name in self.faults:
            raise self.faults[name]
        return Path(out) / dataset / f"{name}-s{seed}.json", {"mAP": 0.5 + seed / 10}


@pytest.fixture
def trained(monkeypatch):
    pretending = Trained()
    monkeypatch.setattr(sweep, "retrain", pretending)
    return pretending


def texts(out):
    """Of every line of the table what stands behind the job."""
    return [line.split("  ")[-1].strip() for line in out.splitlines()]


# ---------------------------------------------------------------------------------------- the file
def test_a_file_is_every_model_on_every_dataset_with_every_seed(here):
    read = Sweep.read(write(datasets=["market", "drawn-people"], rerank=[20, 6, 0.3], views=2))
    assert [str(job) for job in read.jobs] == [
        f"{name} on {dataset}, seed {seed}" for name in ("tiny", "resnet18-stem3-width5") for dataset in
        ("market", "drawn-people") for seed in (0, 1)]
    assert read.name == "panel" and read.recipe.epochs == 1 and read.recipe.input == (32, 16)
    assert (read.how.rerank, read.how.views) == ((20, 6, 0.3), 2)
    assert len({job.key for job in read.jobs}) == 8


def test_where_a_genotype_came_from_is_not_the_question_but_what_it_is_is(here):
    source = next((ROOT / "search_spaces" / "published").glob("darts-v2.json"))
    genotype = json.loads(source.read_text())

    def key(**changes):
        Path("cell.json").write_text(json.dumps({**genotype, **changes}))
        return Sweep.read(write(models=["cell.json"])).jobs[0].key

    first = key()
    assert key(provenance={"command": "another"}) == first
    assert key(normal=genotype["reduction"]) != first


def test_the_recorded_comparison_on_drawn_people_is_one_file(here, monkeypatch):
    monkeypatch.chdir(ROOT)
    searched = "searches/drawn-people-reid-darts-s0/genotype.json"
    path = here / "panel.json"
    path.write_text(json.dumps({
        "models": [searched, {"model": "random-reid", "match": searched},
                   {"model": "random-reid", "match": searched, "set": {"genotype_seed": 1}},
                   {"model": "resnet18", "match": searched, "set": {"stem": 3}}],
        "datasets": ["drawn-people"], "seeds": [0, 1, 2], "recipe": "drawn"}))
    names = {f"{job.name}-s{job.seed}" for job in Sweep.read(path).jobs}
    assert names <= {path.stem for path in Path("results/drawn-people").glob("*.json")} and len(names) == 12


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": ["resnet50"]}, "unknown sweep field 'model'; did you mean 'models'? known: datasets, denominator, expand, "
     "frames, models, recipe, rerank, seeds, set, skip_unreadable, test, views"),
    ({"models": []}, "models=[]: allowed is a list with at least one entry"),
    ({"seeds": []}, "seeds=[]: allowed is a list with at least one entry"),
    ({"seeds": [0, True]}, "seeds=True: allowed is whole numbers from 0 to 2147483647"),
    ({"seeds": 3}, "seeds=3: allowed is a list of whole numbers, as in [0, 1, 2]"),
    ({"datasets": ["markt"]}, "unknown dataset 'markt'; did you mean 'market'?"),
    ({"datasets": [1]}, "datasets=1: allowed is names"),
    ({"test": "markt"}, "unknown dataset 'markt'; did you mean 'market'?"),
    ({"models": ["resnet51"]}, "unknown model 'resnet51'; did you mean 'resnet50'?"),
    ({"models": [7]}, "a model is a JSON object of model and more, got int"),
    ({"models": [{"set": {}}]}, "model is missing: give a name or a genotype file"),
    ({"models": [{"model": "resnet18", "width": 4}]}, "unknown model field 'width'; known: init, match, model, name, set"),
    ({"models": [{"model": "resnet18", "set": {"widht": 4}}]}, "unknown option of resnet18 'widht'; did you mean 'width'?"),
    ({"recipe": "drawm"}, "unknown recipe 'drawm'; did you mean 'drawn'?"),
    ({"set": {"epoch": 3}}, "unknown recipe field 'epoch'; did you mean 'epochs'?"),
    ({"set": {"lr": "fast"}}, "lr=fast: lr must be a number"),
    ({"views": True}, "views=True: allowed is 1, 2 or 10"),
    ({"rerank": [20, 6]}, "rerank=[20, 6]: allowed is [K1, K2, LAMBDA] as in [20, 6, 0.3], or null"),
    ({"rerank": [20.5, 6, 0.3]}, "rerank=[20.5, 6, 0.3]: allowed is [K1, K2, LAMBDA]"),
    ({"skip_unreadable": "no"}, "skip_unreadable=no: allowed is true or false"),
    ({"seeds": [1, 1]}, "'tiny on market, seed 1' and 'tiny on market, seed 1' would write the same result: take one away"),
    ({"models": ["resnet50", {"model": "resnet18", "name": "resnet50"}]},
     "'resnet50 on market, seed 0' and 'resnet50 on market, seed 0' would write the same result"),
    ({"datasets": ["veri", "vric"], "test": "market"}, "'tiny on veri, seed 0' and 'tiny on vric, seed 0' would write"),
])
def test_a_wrong_file_is_refused_before_anything_starts(here, capsys, changes, words):
    assert main(["sweep", write(changes), "--root", "nowhere"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"autoreid: panel.json: {words}") and "\n" not in error
    assert os.listdir() == ["panel.json"]


@pytest.mark.parametrize("key", ["models", "datasets", "recipe"])
def test_what_a_file_must_say(here, key):
    Path("panel.json").write_text(json.dumps({name: value for name, value in FILE.items() if name != key}))
    with pytest.raises(UserError, match=f"panel.json: {key} is missing: give "):
        Sweep.read("panel.json")


def test_no_file_and_no_json(here):
    with pytest.raises(UserError, match="^gone.json: no such sweep file$"):
        Sweep.read("gone.json")
    Path("panel.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="panel.json: a sweep is a JSON object of models, datasets, recipe and more"):
        Sweep.read("panel.json")


@pytest.mark.parametrize(("changes", "words"), [
    ({"datasets": ["market", "veri"]}, "veri"),
    ({"models": ["vit-b16"], "set": {**SMALL, "input": [60, 32]}}, "vit: the picture is 60 x 32"),
    ({"models": [{"model": "resnet18", "init": "gone.pth"}]}, "--init gone.pth: no such file"),
    ({"views": 3}, "views=3: allowed is 1"),
    ({"denominator": "most"}, "unknown denominator 'most'"),
])
def test_what_the_data_or_the_network_forbid_is_found_before_anything_starts(here, market, capsys, trained, changes, words):
    assert main(["sweep", write(changes), "--root", str(market)]) == 2
    assert words in capsys.readouterr().err and not trained and not Path("results").exists()


# ---------------------------------------------------------------------------------------- each job once
def test_each_job_runs_once_and_what_is_added_to_the_file_is_all_that_runs_then(here, market, trained, capsys):
    sweeping = ["sweep", write(), "--root", str(market), "--device", "cpu"]
    assert main(sweeping) == 0
    assert trained == [("tiny", "market", 0), ("tiny", "market", 1), (JOBS[2].split()[0], "market", 0),
                       (JOBS[2].split()[0], "market", 1)]
    out, error = capsys.readouterr()
    assert out.splitlines()[1] == f"{JOBS[1]:39}  finished: mAP 60.0 %"
    assert "4 jobs in results/panel.journal; start the same command again, here or elsewhere" in error
    assert f"{JOBS[0]}: finished: mAP 50.0 %; 3 of 4 jobs left" in error
    assert error.splitlines()[-1] == "next: autoreid compare results/market"
    assert main(sweeping) == 0 and len(trained) == 4
    write(seeds=[2, 1], models=[TINY])
    capsys.readouterr()
    assert main([*sweeping, "--json"]) == 0 and trained[4:] == [("tiny", "market", 2)]
    rows = json.loads(capsys.readouterr().out)
    assert [(row["job"], row["state"], row["mAP"]) for row in rows] == [
        ("tiny on market, seed 2", "finished", 0.7), ("tiny on market, seed 1", "finished", 0.6)]
    assert rows[0]["result"] == "results/market/tiny-s2.json"


def test_a_job_that_was_taken_out_of_the_file_is_left_to_the_workers_that_have_it(here, market, trained):
    both = Sweep.read(write())
    trained.faults["tiny"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(both, "results", root=str(market))  # all are queued
    trained.clear()
    trained.faults.clear()
    sweep.run(Sweep.read(write(seeds=[1])), "results", root=str(market))
    assert {seed for *_, seed in trained} == {1}
    sweep.run(both, "results", root=str(market))
    assert len(trained) == 4


def test_another_recipe_under_the_same_name_is_refused(here, market, trained, capsys):
    assert main(["sweep", write(), "--root", str(market)]) == 0
    assert main(["sweep", write(set={**SMALL, "lr": 0.5}), "--root", str(market)]) == 2
    assert "study sweep-panel was started with recipe.lr=" in (error := capsys.readouterr().err)
    assert "now recipe.lr=0.5: give the sweep's file and --out other names" in error and len(trained) == 4


def test_a_job_that_fails_is_recorded_the_others_go_on_and_retry_runs_it_again(here, market, trained, capsys):
    trained.faults["tiny"] = Diverged("training diverged in epoch 1: the loss is nan; lower the learning rate")
    sweeping = ["sweep", write(seeds=[0]), "--root", str(market)]
    for _ in range(2):
        assert main(sweeping) == 2
        assert len(trained) == 2
        out, error = capsys.readouterr()
        assert texts(out) == [f"failed: {trained.faults['tiny']}", "finished: mAP 50.0 %"]
        assert error.splitlines()[-2] == "next: autoreid compare results/market"
        assert error.splitlines()[-1] == (
            "autoreid: 1 of 2 jobs failed, for the reasons above; when they are mended: autoreid sweep panel.json --root "
            f"{market} --retry")
    trained.faults["tiny"] = MemoryError()
    assert main([*sweeping, "--retry"]) == 2 and len(trained) == 3
    assert "failed: out of memory: MemoryError" in capsys.readouterr().out
    trained.faults.clear()
    assert main([*sweeping, "--retry"]) == 0 and len(trained) == 4
    assert main([*sweeping, "--retry"]) == 0 and len(trained) == 4


def test_the_list_says_of_every_job_how_far_it_is_and_changes_nothing(here, market, trained, capsys):
    listing = ["sweep", write(models=[TINY, OTHER, {**TINY, "name": "b"}], seeds=[0]), "--list"]
    assert main(listing) == 0 and not Path("results").exists()
    out, error = capsys.readouterr()
    assert texts(out) == ["waiting"] * 3
    assert error.splitlines()[-1] == "next: autoreid sweep panel.json"
    trained.faults.update({"tiny": Diverged("it diverged"), "b": KeyboardInterrupt()})
    assert main(["sweep", "panel.json", "--root", str(market)]) == 130
    study = optuna.load_study(study_name="sweep-panel", storage=studies.open_storage(None, "results", "panel.journal")[0])
    with studies._beating(study.ask()):
        size = Path("results/panel.journal").stat().st_size
        capsys.readouterr()
        assert main(listing) == 0
        assert Path("results/panel.journal").stat().st_size == size
    states = texts(capsys.readouterr().out)
    assert states[:2] == ["failed: it diverged", "finished: mAP 50.0 %"]
    assert states[2].startswith("running on ") and states[2].endswith(f", process {os.getpid()}")
    assert len(trained) == 3
    trained.faults.clear()
    assert main(["sweep", "panel.json", "--root", str(market), "--retry"]) == 0
    assert main(listing) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("next: autoreid compare results")


def test_a_storage_that_does_not_exist_and_one_process_of_several(here, market, trained, capsys, monkeypatch):
    assert main(["sweep", write(), "--root", str(market), "--storage", "sqlite:///a.db"]) == 2
    assert "--storage sqlite:///a.db: allowed is postgresql://USER@HOST/DATABASE" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "panel.json", "--root", str(market)]) == 2
    assert "start the command by itself, once for each GPU" in capsys.readouterr().err and not trained


def test_the_peak_memory_of_one_training_is_not_that_of_a_larger_one_before_it():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process reset its peak memory")
    large = np.ones(40_000_000)
    peak = runs.peak_memory_bytes()
    del large
    sweep.forget_peak_memory()
    assert runs.peak_memory_bytes() < peak - 200e6


# ---------------------------------------------------------------------------------------- real trainings
def results(folder="results/market"):
    return {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def test_in_a_real_database_what_retrain_has_finished_counts_and_another_question_is_a_failed_job(here, market, capsys):
    read = Sweep.read(write())
    job = read.jobs[0]
    retrain(job.spec, "market", read.recipe, "results", root=str(market), name="tiny")
    before = Path("results/market/tiny-s0.json").stat().st_mtime_ns
    lower = Sweep.read(write({"set": {**SMALL, "lr": 1e-5}}, "lower.json")).recipe
    retrain(job.spec, "market", lower, "results", root=str(market), name="tiny", seed=1)
    with Server() as server:
        url = server.database("sweeps")
        assert main(["sweep", "panel.json", "--root", str(market), "--storage", url, "--device", "cpu"]) == 2
        out, error = capsys.readouterr()
        assert "results/market/tiny-s0.json is finished: nothing to resume" in error
        states = texts(out)
        assert [state[:13] for state in states] == ["finished: mAP", "failed: --res", "finished: mAP", "finished: mAP"]
        assert "results/market/tiny-s1 was started with recipe.lr=1e-05, now recipe.lr=" in states[1]
        assert Path("results/market/tiny-s0.json").stat().st_mtime_ns == before
        assert not Path("results/panel.journal").exists()
        shutil.rmtree("results/market/tiny-s1")
        Path("results/market/tiny-s1.json").unlink()
        Path("results/market/tiny-s1.safetensors").unlink()
        assert main(["sweep", "panel.json", "--root", str(market), "--storage", url, "--device", "cpu", "--retry"]) == 0
    assert len(results()) == 4 and len({result["recipe"] for result in results().values()}) == 1


def worker(market, *more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "autoreid", "sweep", "panel.json", "--root", str(market), "--device", "cpu", *more],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def trained_by(pid):
    """The folders, with a checkpoint in them, of the jobs that this process trains now."""
    if not Path("results/panel.journal").exists():
        return []
    listed = sweep.states(Sweep.read("panel.json"), "results")
    folders = [Path("results/market") / f"{row['model']}-s{row['seed']}" for row in listed
               if row["text"].endswith(f"process {pid}")]
    return [folder for folder in folders if (folder / "checkpoint.pt").exists()]


def test_of_two_workers_one_is_killed_in_mid_job_and_the_other_does_the_rest_once(here, market, capsys):
    write(set={**SMALL, "epochs": 6})
    victim, other = worker(market), worker(market)
    wait_until(lambda: trained_by(victim.pid))
    os.killpg(victim.pid, signal.SIGKILL)
    out, error = other.communicate(timeout=200)
    assert other.returncode == 0, error
    assert out.count("finished: mAP") == 4 and f"process {victim.pid}) is lost" in error
    assert "resumed after epoch" in error or "is finished: nothing to resume" in error  # killed before it could tell
    victim.communicate()
    assert sorted(results()) == [f"{name}-s{seed}.json" for name in ("resnet18-stem3-width5", "tiny") for seed in (0, 1)]
    study = optuna.load_study(study_name="sweep-panel", storage=studies.open_storage(None, "results", "panel.journal")[0])
    complete = [trial.user_attrs["job"] for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(complete) == len(set(complete)) == 4
    assert sum("retry_of" in trial.user_attrs for trial in studies.trials(study)) == 1
    for folder in Path("results/market").glob("*-s?"):
        assert [row["epoch"] for row in csv.DictReader((folder / "curves.csv").open())] == [str(i) for i in range(6)]
    assert main(["compare", "results/market"]) == 0
    table = capsys.readouterr().out
    assert "tiny" in table and "resnet18-stem3-width5" in table


def test_sigterm_saves_the_job_and_the_same_command_goes_on_with_it(here, market, capsys):
    write(set={**SMALL, "epochs": 6}, models=[TINY], seeds=[0])
    stopped = worker(market)
    wait_until(lambda: Path("results/market/tiny-s0/checkpoint.pt").exists())
    stopped.terminate()
    _, error = stopped.communicate(timeout=60)
    assert stopped.returncode == 0, error
    assert f"resume with: autoreid sweep panel.json --root {market} --device cpu" in error
    assert not results()
    assert main(["sweep", "panel.json", "--list"]) == 0 and "waiting" in capsys.readouterr().out
    assert main(["sweep", "panel.json", "--root", str(market), "--device", "cpu"]) == 0
    assert "resumed after epoch" in capsys.readouterr().err and len(results()) == 1

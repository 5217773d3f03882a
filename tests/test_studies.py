"""Workers that share a study: real processes, real kills, the journal file and a real PostgreSQL server alike."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState
from postgres import Server

from autoreid import runs, studies
from autoreid.errors import UserError

JOBS = 12


def worker(url, folder, stale, seconds):
    """What a worker does: the jobs are queued and worked on. A job has two halves, of which the first is noted."""
    os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w")
    studies.POLL_S, studies.BEAT_S, studies.STALE_S, studies.LOCK_S = 0.05, stale / 4, stale, 3
    study = open_study(folder, url)

    def note(*words):
        with open(folder / "log", "a") as file:
            print(*words, os.getpid(), file=file)

    def objective(trial):
        x = trial.suggest_int("x", 0, JOBS - 1)
        note("start", trial.number, x)
        if "done/half" not in trial.user_attrs:
            time.sleep(seconds / 2)
            trial.set_user_attr("done/half", x)
        assert trial.user_attrs["done/half"] == x
        time.sleep(seconds / 2)
        return x

    for x in range(JOBS):
        studies.enqueue(study, {"x": x}, job=f"job {x}")
    studies.work(study, objective, wanted=None, on_trial=lambda trial: note("told", trial.number, trial.params["x"]))


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(params=["journal", "postgresql"])
def url(request, tmp_path):
    """What ``open_storage`` takes: None, or an empty database of a real server."""
    if request.param == "journal":
        return None
    return request.getfixturevalue("server").database(f"db{os.getpid()}_{time.monotonic_ns()}")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(studies, "POLL_S", 0.02)


def open_study(folder, url=None, name="shared", asked=None, **options):
    return studies.open_study(name, studies.open_storage(url, folder)[0], asked or {"jobs": 12}, **options)


@contextlib.contextmanager
def workers(url, folder, stale=60.0, seconds=0.05):
    """A function that starts one more worker: a process forked from this one, which has Optuna imported already."""
    started = []

    def start():
        started.append(multiprocessing.get_context("fork").Process(target=worker, args=(url, folder, stale, seconds)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def ends_well(processes, folder):
    for process in processes:
        process.join(90)
        assert process.exitcode == 0, (folder / "errors").read_text()


def log(folder):
    """(what, trial's number, x, process) of every line that a worker wrote."""
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [(what, *map(int, numbers)) for what, *numbers in map(str.split, lines)]


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------- real processes
def test_two_workers_that_start_at_once_share_the_work_and_each_job_runs_once(url, tmp_path):
    with workers(url, tmp_path, seconds=0.4) as start:
        pair = [start(), start()]  # both make the tables, the study and the queue
        ends_well(pair, tmp_path)
    assert Counter(x for what, _, x, _ in log(tmp_path) if what == "start") == dict.fromkeys(range(12), 1)
    assert len({pid for *_, pid in log(tmp_path)}) == 2
    study = open_study(tmp_path, url)
    assert sorted(trial.values[0] for trial in studies.finished(study)) == list(range(12))
    assert all(trial.state == TrialState.COMPLETE or trial.user_attrs["void"] == "queued twice" for trial in study.trials)


def test_workers_killed_at_any_moment_lose_no_finished_trial_and_each_lost_one_is_retried_once(url, tmp_path):
    rng = random.Random(5)
    with workers(url, tmp_path, stale=8.0, seconds=0.6) as start:
        alive = [start() for _ in range(3)]
        for _ in range(6):
            victim = alive.pop(rng.randrange(len(alive)))
            wait_until(lambda pid=victim.pid: any(line[-1] == pid for line in log(tmp_path)))
            time.sleep(rng.uniform(0, 0.7))
            os.kill(victim.pid, signal.SIGKILL)  # and left unburied, as in a container without an init
            alive.append(start())
        ends_well(alive, tmp_path)
    study = open_study(tmp_path, url)
    done = studies.finished(study)
    assert sorted(trial.values[0] for trial in done) == list(range(12))
    assert {n for what, n, *_ in log(tmp_path) if what == "told"} <= {trial.number for trial in done}
    lost = [t for t in studies.trials(study) if t.state == TrialState.FAIL]
    again = Counter(t.user_attrs["retry_of"] for t in studies.trials(study) if "retry_of" in t.user_attrs)
    assert lost and again == {trial.number: 1 for trial in lost}
    assert max(Counter(n for what, n, *_ in log(tmp_path) if what == "start").values()) == 1
    for trial in done:
        if "retry_of" in trial.user_attrs:
            before = study.trials[trial.user_attrs["retry_of"]].user_attrs
            kept = {key: value for key, value in before.items() if key in ("job", "done/half")}
            assert "job" in kept and kept.items() <= trial.user_attrs.items()


def test_a_worker_that_stands_still_is_taken_for_lost_and_its_late_end_does_not_count(url, tmp_path):
    with workers(url, tmp_path, stale=1.5, seconds=2.0) as start:
        slow = start()
        wait_until(lambda: log(tmp_path))
        os.kill(slow.pid, signal.SIGSTOP)  # alive by its number: only the beat tells
        first = log(tmp_path)[0][1]
        study = open_study(tmp_path, url)
        start()
        wait_until(lambda: study.get_trials(deepcopy=False)[first].state == TrialState.FAIL)
        os.kill(slow.pid, signal.SIGCONT)
        wait_until(lambda: any(pid == slow.pid for what, *_, pid in log(tmp_path) if what == "told"))  # of its next trial
    assert f"trial {first}: this worker was taken for lost" in (tmp_path / "errors").read_text()
    again = [t for t in studies.trials(study) if t.user_attrs.get("retry_of") == first]
    assert len(again) == 1 and study.trials[first].state == TrialState.FAIL


def test_a_database_that_restarts_ends_neither_the_worker_nor_its_trial(server, tmp_path):
    url = server.database("restarts")
    with workers(url, tmp_path, stale=5.0, seconds=0.4) as start:
        alone = start()
        wait_until(lambda: any(what == "told" for what, *_ in log(tmp_path)))
        server.stop()
        time.sleep(1.5)
        server.start()
        ends_well([alone], tmp_path)
    assert "does not answer" in (tmp_path / "errors").read_text()
    assert sorted(t.values[0] for t in studies.finished(open_study(tmp_path, url))) == list(range(12))


# ---------------------------------------------------------------------------------------- moments, one by one
def test_a_worker_killed_between_ending_a_lost_trial_and_queueing_it_leaves_that_to_the_next(tmp_path, url):
    study = open_study(tmp_path, url)
    studies.enqueue(study, {"x": 3.0}, job="a")
    trial = study.ask()
    trial.set_user_attr("done/half", 7)
    study.tell(trial, state=TrialState.FAIL)
    assert not studies._is_done(study, None, lambda trial: True)  # a worker that looks now must not leave
    studies.work(study, lambda trial: trial.suggest_float("x", 0, 5) + trial.user_attrs["done/half"], wanted=None)
    assert [trial.values for trial in studies.finished(study)] == [[10.0]]
    assert [trial.user_attrs.get("retry_of") for trial in study.trials] == [None, 0]


def test_what_two_workers_queue_at_once_runs_once_also_when_the_second_is_lost(tmp_path, url):
    study = open_study(tmp_path, url)
    for _ in range(3):
        study.enqueue_trial({"x": 1.0}, user_attrs={"once": "one"})  # none saw the others'
    first, second = study.ask(), study.ask()
    study.tell(second, state=TrialState.FAIL)  # killed before it saw that the first stands for the same
    study.tell(first, 1.0)
    studies.enqueue(study, {"x": 1.0}, once="one")
    ran = []
    studies.work(study, lambda trial: ran.append(trial.number) or trial.suggest_float("x", 0, 5), wanted=2)
    assert len(ran) == 1 and "once" not in study.trials[ran[0]].user_attrs  # a new one, as two are wanted
    assert [trial.user_attrs.get("void") for trial in study.trials] == [None, None, "queued twice", None]
    assert [trial.number for trial in studies.finished(study)] == [0, 3]


def test_no_more_trials_run_than_are_wanted_when_two_workers_ask_at_once(tmp_path, url, monkeypatch):
    study, asked = open_study(tmp_path, url), []
    ask = study.ask

    def another_first():
        if not asked:
            asked.append(open_study(tmp_path, url).ask())
        return ask()

    monkeypatch.setattr(study, "ask", another_first)
    monkeypatch.setattr(studies, "STALE_S", 0.2)
    studies.work(study, lambda trial: trial.suggest_float("x", 0, 5), wanted=1)
    assert study.trials[1].user_attrs["void"] == "1 are wanted"
    assert [trial.user_attrs.get("retry_of") for trial in studies.finished(study)] == [0]  # the other never beat


def test_only_the_trials_that_are_mine_are_run_and_waited_for(tmp_path):
    study = open_study(tmp_path)
    for job in "abc":
        studies.enqueue(study, {}, once=job, job=job)
    studies.work(study, lambda trial: 1.0, wanted=None, mine=lambda trial: trial.user_attrs["job"] != "b")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "WAITING", "COMPLETE"]


def test_a_beat_counts_as_the_observer_sees_it_and_clocks_do_not_matter(tmp_path, monkeypatch):
    study, now = open_study(tmp_path), [1000.0]
    monkeypatch.setattr(studies.time, "monotonic", lambda: now[0])
    trial, watch = study.ask(), studies.Watch(study)
    beat = {"host": "far", "pid": 1, "place": "far away", "started": "1"}

    def state(seconds, at):
        now[0] += seconds
        if at is not None:
            trial.set_user_attr("beat", {"time": at, **beat})
        watch.retry_lost()
        return study.trials[0].state.name

    assert state(0, None) == "RUNNING"
    assert state(100, None) == "RUNNING"  # it may be about to beat for the first time
    assert state(100, 5.0) == "RUNNING"  # a clock of 1970
    assert state(119, None) == "RUNNING"
    assert state(100, 4e9) == "RUNNING"  # of 2096
    assert state(119, None) == "RUNNING"
    assert state(2, None) == "FAIL"
    assert study.trials[1].user_attrs == {"once": "trial 0 again", "retry_of": 0, "attempt": 1}


def test_a_process_number_that_is_used_again_or_on_another_machine_is_not_the_worker():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    beat = {"pid": child.pid, "place": studies._place(), "started": studies._started(child.pid)}
    assert beat["place"] and beat["started"]
    assert not studies._gone(beat)
    assert studies._gone({**beat, "started": str(int(beat["started"]) - 1)})
    assert not studies._gone({**beat, "place": None})
    child.kill()
    wait_until(lambda: studies._gone(beat))  # unburied: join has not been called
    child.join()
    assert studies._gone(beat)
    assert not studies._gone({**beat, "place": "another machine"})


# ---------------------------------------------------------------------------------------- how a trial ends
class Wrong(UserError):
    pass


@pytest.mark.parametrize(("raised", "reason"), [
    (Wrong("it diverged"), "it diverged"),
    (MemoryError(), "out of memory: MemoryError"),
    (RuntimeError("CUDA out of memory. Tried 2 GiB\nmore"), "out of memory: CUDA out of memory. Tried 2 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
     "out of memory: DefaultCPUAllocator: can't allocate memory: you tried"),
    (float("nan"), "the objective is nan"),
], ids=["survived", "memory", "gpu", "cpu", "nan"])
def test_what_fails_is_recorded_and_the_work_goes_on(tmp_path, raised, reason):
    study, ended = open_study(tmp_path), []

    def objective(trial):
        if trial.number == 0:
            if isinstance(raised, Exception):
                raise raised
            return raised
        return 1.0

    studies.work(study, objective, wanted=2, survives=(Wrong,), on_trial=ended.append)
    assert [(trial.state.name, trial.user_attrs.get("reason")) for trial in ended] == [("FAIL", reason), ("COMPLETE", None)]
    assert [trial.number for trial in studies.finished(study)] == [0, 1]


def test_a_pruned_trial_counts_and_keeps_its_last_value(tmp_path):
    study = open_study(tmp_path)

    def objective(trial):
        trial.report(0.25, 1)
        raise optuna.TrialPruned

    studies.work(study, objective, wanted=1)
    assert [(trial.state.name, trial.value) for trial in studies.finished(study)] == [("PRUNED", 0.25)]


@pytest.mark.parametrize(("raised", "losses"), [
    (runs.Preempted(), 0), (KeyboardInterrupt(), 0), (RuntimeError("a fault of ours"), 1), (Wrong("a wrong folder"), 1),
], ids=["sigterm", "ctrl-c", "fault", "user"])
def test_what_ends_the_worker_puts_its_trial_back_into_the_queue(tmp_path, raised, losses):
    study = open_study(tmp_path)

    def objective(trial):
        trial.suggest_float("x", 0, 5)
        trial.set_user_attr("done/a", 1)
        raise raised

    with pytest.raises(type(raised)):
        studies.work(study, objective, wanted=5)
    first, again = study.trials
    assert (first.state.name, again.state.name) == ("FAIL", "WAITING") and not studies.finished(study)
    assert again.user_attrs == {"done/a": 1, "once": "trial 0 again", "retry_of": 0, "attempt": losses}
    studies.work(study, lambda trial: trial.suggest_float("x", 0, 5), wanted=1)
    assert studies.finished(study)[0].params == first.params


def test_a_trial_that_keeps_losing_its_workers_is_given_up(tmp_path):
    study = open_study(tmp_path)
    studies.enqueue(study, {}, job="a")

    def objective(trial):
        raise RuntimeError("as if killed")

    for _ in range(studies.LOSSES):
        with pytest.raises(RuntimeError):
            studies.work(study, objective, wanted=None)
    studies.work(study, objective, wanted=None)
    assert [trial.user_attrs["reason"] for trial in studies.finished(study)] == ["5 workers were lost that ran it"]
    assert len(study.trials) == studies.LOSSES


def test_sigterm_ends_a_worker_that_waits(tmp_path, monkeypatch):
    study = open_study(tmp_path)
    trial = open_study(tmp_path).ask()
    with studies._beating(trial), runs.heeding_sigterm(), pytest.raises(runs.Preempted):
        monkeypatch.setattr(studies, "POLL_S", 0)
        monkeypatch.setattr(studies.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        studies.work(study, lambda trial: 1.0, wanted=None)


# ---------------------------------------------------------------------------------------- where a study lies
@pytest.mark.parametrize("cut", [1, 7, 30, 60])
def test_a_journal_whose_last_line_is_torn_loses_that_line_alone(tmp_path, cut):
    study = open_study(tmp_path)
    studies.enqueue(study, {"x": 1.0})
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    studies.enqueue(study, {"x": 2.0})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])  # killed while it wrote the second
    joined = open_study(tmp_path)
    assert len(joined.trials) == 1
    studies.enqueue(joined, {"x": 3.0})
    studies.work(joined, lambda trial: trial.suggest_float("x", 0, 5), wanted=None)
    assert [trial.value for trial in open_study(tmp_path).trials] == [1.0, 3.0]
    assert path.read_bytes().startswith(whole)


def test_a_journal_killed_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / "study.journal").write_text('{"op_code":0,"worker')
    assert open_study(tmp_path).user_attrs["asked"]["jobs"] == 12


@pytest.mark.parametrize("text", ["not a journal\n", "[1]\n", '{"op":1}\n', '{"op_code":99}\n'])
def test_a_damaged_journal_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "study.journal").write_text(text + text)
    with pytest.raises(UserError, match="study.journal is no journal of Optuna, or it is damaged .*: move it away"):
        studies.open_storage(None, tmp_path)


def test_a_relative_folder_is_made_and_shown_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage, shown = studies.open_storage(None, "a/b", "tune.journal")
    assert shown == "a/b/tune.journal" and (tmp_path / shown).is_file()
    monkeypatch.chdir("/")
    studies.open_study("s", storage, {})  # the lock lies beside the file wherever the worker is


@pytest.mark.parametrize("url", ["sqlite:///study.db", "mysql://user:secret@host/db", "study.journal", "postgresql://",
                                 "postgresql+pg8000://user:secret@host/db"])
def test_any_other_storage_is_refused_and_no_password_is_shown(tmp_path, url):
    with pytest.raises(UserError, match="allowed is postgresql://USER@HOST/DATABASE, or nothing for a journal") as error:
        studies.open_storage(url, tmp_path)
    assert "secret" not in str(error.value)


def test_a_database_that_does_not_answer_and_a_missing_driver_are_one_line(tmp_path, monkeypatch):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    url = "postgresql://user:secret@127.0.0.1:1/db"
    with pytest.raises(UserError, match=r"postgresql://user:\*\*\*@127.0.0.1:1/db: no study can be kept there: ") as error:
        studies.open_storage(url, tmp_path)
    assert "\n" not in str(error.value) and "secret" not in str(error.value) and "refused" in str(error.value)
    monkeypatch.setattr(studies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"psycopg, the driver of PostgreSQL, is not installed: pip install '.\["):
        studies.open_storage(url, tmp_path)


def test_a_study_of_another_question_is_refused_by_the_first_that_differs(tmp_path, url):
    asked = {"recipe": {"lr": 0.1, "epochs": 3}, "folds": 2}
    open_study(tmp_path, url, asked=asked)
    open_study(tmp_path, url, asked={"folds": 2, "recipe": {"epochs": 3, "lr": 0.1}})
    with pytest.raises(UserError, match="study shared was started with recipe.lr=0.1, now recipe.lr=0.2: give the same"):
        open_study(tmp_path, url, asked={"recipe": {"lr": 0.2, "epochs": 4}, "folds": 2})
    with pytest.raises(UserError, match=r"started with folds=2, now folds=null: take another"):
        open_study(tmp_path, url, asked={"recipe": {"lr": 0.1, "epochs": 3}}, instead="take another")
    with pytest.raises(UserError, match=r'directions=\["maximize"\], now directions=\["maximize", "minimize"\]'):
        open_study(tmp_path, url, asked=asked, directions=["maximize", "minimize"])


def test_several_processes_of_torchrun_are_no_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the command by itself, once for each GPU"):
        open_study(tmp_path)

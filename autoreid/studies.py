"""What many worker processes share: an Optuna study in a journal file or in PostgreSQL, its trials, and who runs them.

A worker is a process that calls :func:`work`; any number of them, started at any time on any machine that reaches the
storage, share the trials of a study. What must happen once rests on two operations that a storage carries out atomically:
a waiting trial becomes a running one for one worker only, and a trial is finished once. A worker may be killed between
any two lines here.

A running trial beats: every ``BEAT_S`` seconds its worker renews a user attribute, on either storage (Optuna's own
heartbeat knows databases only). A trial is lost when its process is gone, which is seen at once on the same machine, or
when the beat stands still for ``STALE_S`` seconds *as the observer counts them*: the clocks of two machines are never
compared. A lost trial is told FAIL and queued again with its parameters and user attributes. Two workers may both do so
in one moment, therefore a queued trial says in ``once`` what it stands for, and of equal ones the lowest number runs.

User attributes that this module writes: ``beat`` (time, and the process that runs the trial), ``once``, ``retry_of`` (a
trial's number), ``attempt`` (how many of its workers were lost before), ``handed_back`` (by a worker that was stopped),
``reason`` (of a FAIL that counts) and ``void`` (why it was never run; it counts nowhere).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from autoreid.errors import UserError
from autoreid.runs import Preempted, asked_to_stop, key_of, say, without_password

T = TypeVar("T")
BEAT_S = 15.0
STALE_S = 120.0
LOCK_S = 30  # after which the lock of a journal is broken: who held it was killed in the milliseconds that it takes
POLL_S = 2.0  # how often a worker with nothing to do looks again
PATIENCE_S = 600.0  # how long a database may be away
LOSSES = 5  # a trial that has lost so many workers is not tried again: it may be what kills them
OWN = {"beat", "once", "retry_of", "attempt", "handed_back", "reason", "void"}
DRIVERS = ("psycopg", "psycopg2")
TABLES_LOCK = 5_274_001  # any number that no other program locks in the same database


# ---------------------------------------------------------------------------------------- where a study lies
def open_storage(storage: str | None, folder: str | Path, journal: str = "study.journal") -> tuple[BaseStorage, str]:
    """The storage, and its name to be shown, without a password: where ``storage`` is None, the file ``journal`` in
    ``folder``, which is made; else the PostgreSQL database at this URL, whose tables are made where they are missing.

    Raises UserError for any other URL, a missing driver, a database that does not answer, or a damaged journal.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the commands say lines of their own
    if storage is not None:
        return _database(storage), without_password(storage)
    path = Path(folder).resolve() / journal  # absolute: the lock is a symbolic link to it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), _Lock(str(path)))), str(Path(folder) / journal)
    except (ValueError, KeyError, TypeError, AssertionError) as fault:
        raise UserError(
            f"{path} is no journal of Optuna, or it is damaged ({fault}): move it away and start again; what was trained "
            "is kept elsewhere"
        ) from None


class _Lock(JournalFileSymlinkLock):
    """Optuna's lock of a journal file, also on NFS, that cuts off a torn last line: its writer was killed in mid-line.

    A torn line was acknowledged to nobody. Left there, the next record would be glued to it, and nothing after it read.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, grace_period=LOCK_S)
        self.path = path

    def acquire(self) -> bool:
        super().acquire()
        try:
            with open(self.path, "rb+") as file:
                if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return True


def _database(url: str) -> BaseStorage:
    scheme, _, rest = url.partition("://")
    kind, _, driver = scheme.partition("+")
    if kind != "postgresql" or driver not in ("", *DRIVERS) or not rest:
        raise UserError(
            f"--storage {without_password(url)}: allowed is postgresql://USER@HOST/DATABASE, or nothing for a journal file"
        )
    found = [name for name in ([driver] if driver else DRIVERS) if importlib.util.find_spec(name)]
    if not found:
        raise UserError(f"--storage {without_password(url)}: {driver or DRIVERS[0]}, the driver of PostgreSQL, is not "
                        "installed: pip install '.[distributed]'")
    import sqlalchemy

    options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}  # seconds
    try:
        engine = sqlalchemy.create_engine(f"postgresql+{found[0]}://{rest}", **options)
        with engine.begin() as connection:  # workers that start at once must not make the tables twice
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({TABLES_LOCK})"))
            return optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False), engine_kwargs=options)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError, ValueError) as fault:
        why = " ".join(str(getattr(fault, "orig", None) or fault).split())
        raise UserError(f"--storage {without_password(url)}: no study can be kept there: {why}") from None


# ---------------------------------------------------------------------------------------- a study and its queue
def open_study(
    name: str,
    storage: BaseStorage,
    asked: Mapping[str, Any],
    *,
    directions: Sequence[str] = ("maximize",),
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    instead: str = "give the same options, or another --study NAME",
) -> optuna.Study:
    """The study of this name, created or joined. ``asked``, a JSON value, is kept with it.

    Raises UserError where the study was started with another question: it names the first value that differs, and what
    to do ``instead``. Also under torchrun, as a worker is one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "torchrun joins its processes to one training, and workers of a study train each their own: start the command "
            "by itself, once for each GPU, as in CUDA_VISIBLE_DEVICES=1 autoreid ..."
        )
    study = optuna.create_study(
        study_name=name, storage=storage, directions=[StudyDirection[word.upper()] for word in directions],
        sampler=sampler, pruner=pruner, load_if_exists=True,
    )
    now = json.loads(json.dumps({**asked, "directions": list(directions)}))
    if "asked" not in study.user_attrs:
        study.set_user_attr("asked", now)
    if difference := next(_differences(study.user_attrs["asked"], now), None):
        raise UserError(f"study {name} was started with {difference}: {instead}")
    return study


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """``name=then, now name=now`` of every innermost value that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**now, **then}:
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name}={json.dumps(then)}, now {name}={json.dumps(now)}"


def enqueue(study: optuna.Study, params: Mapping[str, Any], /, *, once: str | None = None, **attrs: Any) -> None:
    """Queue a trial with these parameters and user attributes, once for all workers and all times.

    ``once`` is what the trial stands for; by default its parameters.
    """
    once = once or key_of(params)
    if not any(trial.user_attrs.get("once") == once for trial in study.get_trials(deepcopy=False)):
        study.enqueue_trial(dict(params), user_attrs={**attrs, "once": once})


def trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study as they are now, in the order of their numbers, but for those that are not to be run: another
    of a lower number stands for the same, as two workers queued it at once, or it is void. They are not to be changed."""
    return _standing(study.get_trials(deepcopy=False))


def _standing(some: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    known: set[str] = set()
    kept = []
    for trial in some:
        once = trial.user_attrs.get("once")
        if "void" not in trial.user_attrs and once not in known:
            kept.append(trial)
            known |= {once} if once else set()
    return kept


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that are COMPLETE, PRUNED, or FAILed for a ``reason``."""
    return [trial for trial in trials(study) if trial.state.is_finished() and not _is_lost(trial)]


def _is_lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs


def _unqueued(some: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The lost trials that nobody has queued again yet: a worker may be killed after ending one."""
    queued = {trial.user_attrs.get("retry_of") for trial in some}
    return [trial for trial in some if _is_lost(trial) and trial.number not in queued]


def _places(some: Sequence[FrozenTrial]) -> int:
    """How many are finished, running or queued."""
    return sum(not _is_lost(trial) for trial in some)


# ---------------------------------------------------------------------------------------- the worker
def work(
    study: optuna.Study,
    objective: Callable[[Trial], float | Sequence[float]],
    *,
    wanted: int | None,
    on_trial: Callable[[FrozenTrial], None] | None = None,
    survives: tuple[type[Exception], ...] = (),
    mine: Callable[[FrozenTrial], bool] = lambda trial: True,
) -> None:
    """Run trials of the study until ``wanted`` of them are :func:`finished`, by whichever worker; with None, until all
    queued ones are that are ``mine`` (others are left to other workers).

    Queued trials go first. While others run what is left this worker waits: should they be lost, it takes over.

    What ``objective`` raises: ``optuna.TrialPruned`` makes the trial PRUNED; an exception in ``survives``, or running
    out of memory, makes it FAIL, the message being its ``reason``, and the work goes on. Anything else, be it a fault,
    ``Preempted`` or KeyboardInterrupt, puts the trial back into the queue and ends the worker by going on to the caller.

    ``on_trial`` is called with every trial that this worker has made COMPLETE, PRUNED or FAIL.
    """
    watch = Watch(study)
    while True:
        if asked_to_stop():
            raise Preempted
        patiently(watch.retry_lost)
        if patiently(lambda: _is_done(study, wanted, mine)):
            return
        trial = patiently(lambda: _take(study, wanted, mine))
        if trial is None:
            time.sleep(POLL_S)
        elif (told := _run(study, trial, objective, survives)) is not None and on_trial is not None:
            on_trial(told)


def patiently(call: Callable[[], T]) -> T:
    """What ``call`` returns, which is called again while the database is away, for ``PATIENCE_S`` at most."""
    began = last = time.monotonic()
    while True:
        try:
            return call()
        except Exception as fault:
            now = time.monotonic()
            if not _is_away(fault) or now - began > PATIENCE_S:
                raise
            if asked_to_stop():
                raise Preempted from None
            if last == began or now - last > 60:
                say(f"the study's database does not answer; trying for another {PATIENCE_S - (now - began):.0f} s")
                last = now
            time.sleep(POLL_S)


def _is_away(fault: BaseException) -> bool:
    away = ("OperationalError", "InterfaceError", "PendingRollbackError")  # of SQLAlchemy
    return isinstance(fault, StorageInternalError) and type(fault.__cause__).__name__ in away


def _is_done(study: optuna.Study, wanted: int | None, mine: Callable[[FrozenTrial], bool]) -> bool:
    if wanted is not None:
        return len(finished(study)) >= wanted
    now = trials(study)
    return not any(map(mine, [*(trial for trial in now if not trial.state.is_finished()), *_unqueued(now)]))


def _take(study: optuna.Study, wanted: int | None, mine: Callable[[FrozenTrial], bool]) -> Trial | None:
    """A queued trial, or a new one where fewer than ``wanted`` are finished, running or queued; None for neither."""
    every = study.get_trials(deepcopy=False)
    now = _standing(every)
    numbers = {trial.number for trial in now}
    for waiting in (trial for trial in every if trial.state == TrialState.WAITING):
        if waiting.number not in numbers:
            _make_void(study, waiting._trial_id, "queued twice")
        elif mine(waiting) and _claim(study, waiting._trial_id):
            return Trial(study, waiting._trial_id)
    if wanted is None or _places(now) >= wanted:
        return None
    trial = study.ask()
    now = trials(study)
    if trial.number not in {t.number for t in now}:  # it was queued in the meantime, and twice
        _make_void(study, trial._trial_id, "queued twice")
    elif "once" not in trial.user_attrs and _places([t for t in now if t.number < trial.number]) >= wanted:
        _make_void(study, trial._trial_id, f"{wanted} are wanted")  # another worker asked at the same time
    else:
        return trial
    return None


def _claim(study: optuna.Study, trial_id: int) -> bool:
    """Whether this worker, of all, is the one that runs a queued trial."""
    try:
        return study._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


def _make_void(study: optuna.Study, trial_id: int, why: str) -> None:
    with suppress(UpdateFinishedTrialError):  # so did another worker
        study._storage.set_trial_user_attr(trial_id, "void", why)
        study._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def _run(
    study: optuna.Study,
    trial: Trial,
    objective: Callable[[Trial], float | Sequence[float]],
    survives: tuple[type[Exception], ...],
) -> FrozenTrial | None:
    """Run a trial and tell its end; the trial as it is told then, or None where it does not count."""
    state, values, reason = TrialState.FAIL, None, None
    with _beating(trial):
        try:
            value = objective(trial)
            values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
            if all(math.isfinite(v) for v in values):
                state = TrialState.COMPLETE
            else:
                values, reason = None, f"the objective is {value}"
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except UpdateFinishedTrialError:
            _say_taken(trial)
            return None
        except survives as fault:
            reason = str(fault)
        except BaseException as fault:
            if _is_away(fault):
                patiently(lambda: _hand_back(study, trial, stopped=True))
                return None
            if not _is_out_of_memory(fault):
                with suppress(StorageInternalError):  # then it stops beating, which does as well
                    _hand_back(study, trial, isinstance(fault, (Preempted, KeyboardInterrupt)))
                raise
            reason = f"out of memory: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}"
        return patiently(lambda: _tell(study, trial, state, values, reason))


def _is_out_of_memory(fault: BaseException) -> bool:
    """Python's, or torch's on a GPU or a CPU."""
    text = str(fault)
    return isinstance(fault, MemoryError) or (
        isinstance(fault, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))


def _tell(
    study: optuna.Study, trial: Trial, state: TrialState, values: list[float] | None, reason: str | None
) -> FrozenTrial | None:
    try:
        if reason is not None:
            trial.set_user_attr("reason", reason)
        study.tell(trial, values, state=state)
    except (UpdateFinishedTrialError, ValueError):  # it is finished already
        told = study._storage.get_trial(trial._trial_id)
        if not told.state.is_finished():
            raise
        if told.state != state:
            _say_taken(trial)
            return None
    return study._storage.get_trial(trial._trial_id)


def _say_taken(trial: Trial) -> None:
    say(f"trial {trial.number}: this worker was taken for lost, and the trial was queued again; what it found is left out")


def _hand_back(study: optuna.Study, trial: Trial, stopped: bool) -> None:
    """Put a trial back into the queue: its worker was ``stopped``, or fails, which counts as a loss."""
    with suppress(UpdateFinishedTrialError):  # taken for lost meanwhile
        if stopped:
            trial.set_user_attr("handed_back", True)
        _lose(study, study._storage.get_trial(trial._trial_id))
    _queue_lost(study)


# ---------------------------------------------------------------------------------------- lost workers
@contextmanager
def _beating(trial: Trial) -> Iterator[None]:
    """Say who runs the trial, and that it is alive, as long as the block runs."""
    process = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "started": _started(os.getpid())}
    over = threading.Event()

    def beat() -> bool:
        try:  # not through the Trial: another thread reads its attributes
            trial.storage.set_trial_user_attr(trial._trial_id, "beat", {"time": round(time.time(), 3), **process})
        except UpdateFinishedTrialError:
            return False
        except Exception as fault:
            if not _is_away(fault):
                raise
        return True

    def beats() -> None:
        while not over.wait(BEAT_S) and beat():
            pass

    beat()
    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Watch:
    """One worker's observation of the others' beats."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.seen: dict[int, tuple[Any, float]] = {}  # of a running trial the last beat, and since when it stands still

    def retry_lost(self) -> None:
        """End the running trials that nobody runs any more, and queue again what was lost, by whomever it was ended."""
        for trial in trials(self.study):
            if trial.state == TrialState.RUNNING and self._lost(trial):
                with suppress(UpdateFinishedTrialError):  # another worker was first, or this one lives after all
                    _lose(self.study, trial)
                    beat = trial.user_attrs.get("beat", {})
                    who = f" ({beat['host']}, process {beat['pid']})" if beat else ""
                    say(f"trial {trial.number}: its worker{who} is lost")
        _queue_lost(self.study)

    def _lost(self, trial: FrozenTrial) -> bool:
        beat, now = trial.user_attrs.get("beat"), time.monotonic()
        last, since = self.seen.get(trial.number, (None, now))
        self.seen[trial.number] = (beat, since if beat == last else now)
        return (beat is not None and _gone(beat)) or now - self.seen[trial.number][1] > STALE_S


def _lose(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial that is not run any more: with a ``reason`` where it has lost too many workers, else to be queued."""
    if _losses(trial) >= LOSSES:
        study._storage.set_trial_user_attr(trial._trial_id, "reason", f"{LOSSES} workers were lost that ran it")
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _losses(trial: FrozenTrial) -> int:
    """How many workers have been lost with the one that has just ended."""
    return trial.user_attrs.get("attempt", 0) + (not trial.user_attrs.get("handed_back", False))


def _queue_lost(study: optuna.Study) -> None:
    """Queue every lost trial once more, with its parameters and what was noted in its user attributes."""
    for trial in _unqueued(trials(study)):
        kept = {key: value for key, value in trial.user_attrs.items() if key not in OWN}
        enqueue(
            study, {**trial.system_attrs.get("fixed_params", {}), **trial.params}, **kept,
            once=f"trial {trial.number} again", retry_of=trial.number, attempt=_losses(trial),
        )


def _place() -> str | None:
    """What machine this is, since it was started, and which of its containers; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks: process numbers are used again. None: it ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _gone(beat: Mapping[str, Any]) -> bool:
    """Whether the process is of this machine and has ended."""
    if beat["place"] is None or beat["place"] != _place():
        return False
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return _started(beat["pid"]) != beat["started"]

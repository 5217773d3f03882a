"""Records: files written whole or not at all, the environment that made them, and the folder of one run.

Every record carries its command, seed, package versions, commit, wall time and peak memory, so that a figure can be
made again. No torch at import: the command line's ``--help`` must start in well under half a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from autoreid.errors import UserError
from autoreid.options import read_json

T = TypeVar("T")
PACKAGES = ("autoreid", "torch", "torchvision", "numpy", "pandas", "optuna", "pillow", "safetensors")


# ---------------------------------------------------------------------------------------- whole files
@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the name ``path`` only when the block ends without an error.

    The data is flushed to the disk before the rename, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a record is for everybody
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------- provenance
def key_of(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def command() -> str:
    """The command as the user typed it, without the interpreter's path."""
    started = [] if processes() == 1 else ["torchrun", "--nproc-per-node", str(processes()), "-m"]
    return without_password(" ".join([*started, Path(sys.argv[0]).name.replace("__main__.py", "autoreid"), *sys.argv[1:]]))


def without_password(text: str) -> str:
    """URLs in a text without the passwords in them."""
    text = re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", text)


def processes() -> int:
    """How many train together. Asked of torch only where it is loaded: this file must not load it."""
    joined = sys.modules.get("autoreid.parallel")
    return joined.processes() if joined else 1


def is_first() -> bool:
    """Whether this process writes and speaks: the first of those that train together."""
    joined = sys.modules.get("autoreid.parallel")
    return joined.is_first() if joined else True


def _wait() -> None:
    if joined := sys.modules.get("autoreid.parallel"):
        joined.wait()


# ---------------------------------------------------------------------------------------- stopping
class Preempted(Exception):
    """The system wants the machine back (SIGTERM): the state is saved, ``--resume`` goes on from there."""


_asked_to_stop = False


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Within the block SIGTERM only sets a flag, which the work looks at between two batches: :func:`asked_to_stop`."""
    global _asked_to_stop

    def heed(number: int, frame: Any) -> None:
        global _asked_to_stop
        _asked_to_stop = True

    _asked_to_stop = False
    before = signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked_to_stop = False


def asked_to_stop() -> bool:
    """Whether SIGTERM came; the same on all processes that train together, if each asks."""
    joined = sys.modules.get("autoreid.parallel")
    return joined.agree(_asked_to_stop) if joined else _asked_to_stop


def commit() -> str | None:
    """The git commit of the checkout the package runs from, ``+`` appended when code differs from it; else None.

    Only the package's own files count: results lying in the working tree do not change what the code does.
    """
    package = Path(__file__).resolve().parent
    git = ["git", "-C", str(package)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return None  # an installed wheel inside somebody else's checkout
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", str(package), str(package.parent / "search_spaces")],
            capture_output=True, text=True, timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Python, package versions, processor, commit and command of this process."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")  # the order of sums, and so the last bits, depend on the number of threads
    return {
        **versions, "processor": processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None, "commit": commit(), "command": command(),
    }


def processor() -> str:
    """The processor's model name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Peak resident memory of this process in bytes, 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def forget_peak_memory() -> None:
    """A result tells the peak of its own training, not of the larger network that this process trained before it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux: of this process the peak becomes what it holds now
        Path("/proc/self/clear_refs").write_text("5")


def folder_name(dataset: str) -> str:
    """A dataset's name as that of a folder: ``cuhk03/labeled`` is ``cuhk03-labeled``."""
    return dataset.replace("/", "-")


# ---------------------------------------------------------------------------------------- one run's folder
class Run:
    """The folder of one long command: what it was asked, where it stands, what it found.

    ``config.json`` says what was asked, ``environment.json`` where it ran; ``checkpoint.pt`` holds the exact state of
    the last whole epoch (or of the batch where SIGTERM came) with its SHA-256, ``checkpoint.before.pt`` the one before;
    ``summary.json`` is written last and says that the run is finished. Of processes that train together the first writes.

    Making a Run only looks: a folder with a ``config.json`` is refused without ``resume`` or ``overwrite``, and
    ``resume`` accepts only the same question. Nothing is written before :meth:`open`, which the work calls when all
    that the user gave has been found good. ``results`` are files elsewhere that belong to the run.
    """

    FILES = ("config.json", "environment.json", "checkpoint.pt", "checkpoint.before.pt", "summary.json", "genotype.json",
             "curves.csv", "alphas.csv", "genotype.png", "alphas.png", "curves.png", "swag.safetensors")
    EVENTS = "events.out.tfevents.*"  # TensorBoard's, whose names hold the time and the machine

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool, results: Sequence[Path] = ()
    ) -> None:
        self.folder, self.results, self.overwrite = Path(folder), tuple(results), overwrite
        self.config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
        if processes() > 1:  # resumed by another number of processes it would not end in the same state
            self.config["processes"] = processes()
        self.resumes = resume and self._config.exists()
        if self.resumes:
            self._refuse_another_question(read_json(self._config, "run configuration"))
        elif not overwrite:
            there = next((path for path in (self._config, *self.results) if path.exists()), None)
            name = " or --name NAME" if self.results else ""
            if there == self._config:
                state = "a finished" if self.summary.exists() else "an unfinished"
                raise UserError(
                    f"{self.folder} already holds {state} run: add --resume to go on with it, "
                    f"--overwrite to start it anew, or write elsewhere with --out DIR{name}"
                )
            if there:
                raise UserError(
                    f"{there} is there already: add --overwrite to make it anew, or write elsewhere with --out DIR{name}"
                )

    @classmethod
    def clear(cls, folder: Path, results: Iterable[Path]) -> None:
        """Take a run away: its results first and the question last, so that no old result is left beside a new one."""
        for path in (*results, *folder.glob(cls.EVENTS), *(folder / name for name in reversed(cls.FILES))):
            path.unlink(missing_ok=True)

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def summary(self) -> Path:
        """Written last: its presence says that the run is finished."""
        return self.folder / "summary.json"

    @property
    def finished(self) -> bool:
        """A resumed run that has nothing left to do."""
        return self.resumes and self.summary.exists()

    def open(self) -> None:
        """Begin to write: a new run's folder is cleared of what an overwritten one left, then says what is asked."""
        _wait()  # until every process has looked at what was there
        if is_first():
            self._open()
        _wait()

    def _open(self) -> None:
        if self.folder.is_dir():
            for left in self.folder.glob(".*"):  # temporary files of a killed process
                if left.is_file():
                    left.unlink()
        if self.resumes:
            return
        self.clear(self.folder, self.results)
        write_json(self.folder / "environment.json", environment())
        write_json(self._config, self.config)

    def _refuse_another_question(self, before: Mapping[str, Any]) -> None:
        now, then = ({"processes": 1, **_flat(config)} for config in (self.config, before))
        for name in sorted({*now, *then}):
            if then.get(name) != now.get(name):
                raise UserError(
                    f"--resume: {self.folder} was started with {name}={then.get(name)}, now {name}={now.get(name)}: "
                    "give the same options, or --overwrite to start anew"
                )

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the exact state, whole or not at all; tensors and plain values only (read with weights_only). The state
        saved before stays beside it."""
        if not is_first():
            return
        import torch

        buffer = io.BytesIO()  # in memory first: torch hides a full disk behind an error of its own
        torch.save(dict(state), buffer)
        data = buffer.getvalue()
        sealed = io.BytesIO()
        inner = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        torch.save({"sha256": hashlib.sha256(data).hexdigest(), "state": inner}, sealed)
        with whole_file(self.checkpoint) as temporary:
            temporary.write_bytes(sealed.getvalue())
            if self.checkpoint.exists():
                os.replace(self.checkpoint, self._before)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None for a run that has none (a new one, or one stopped in its first epoch).

        Where the last is damaged it is the one before, with a warning; UserError where that is damaged too.
        """
        return self.saved(self.folder)

    @classmethod
    def saved(cls, folder: Path) -> dict[str, Any] | None:
        """As :meth:`load`, of the run in this folder."""
        there = [path for name in ("checkpoint.pt", "checkpoint.before.pt") if (path := folder / name).exists()]
        for path in there:
            try:
                state = cls._read(path)
            except Exception as fault:  # torch raises many kinds for a damaged file
                why = fault if isinstance(fault, _Changed) else type(fault).__name__  # torch's own words advise a risk
                say(f"warning: {path} cannot be read ({why}): it is damaged")
                continue
            if path.name == "checkpoint.before.pt":
                say(f"warning: going on from the state before, {path}")
            return state
        if not there:
            return None
        raise UserError(
            f"{' and '.join(map(str, there))} cannot be read: damaged; start the run anew with --overwrite"
        )

    @property
    def _before(self) -> Path:
        return self.folder / "checkpoint.before.pt"

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        import torch

        sealed = torch.load(path, map_location="cpu", weights_only=True)
        data = sealed["state"].numpy().tobytes()
        if hashlib.sha256(data).hexdigest() != sealed["sha256"]:
            raise _Changed("its SHA-256 differs from the one written in it")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _Changed(Exception):
    """A saved state that is not what was saved."""


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by its innermost names: ``{"recipe": {"lr": 1}}`` to ``{"recipe.lr": 1}``."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(_flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item})
    return found


def rows_up_to(path: Path, epoch: int) -> list[str]:
    """The header and the rows of a CSV whose first column, the epoch, is below ``epoch``; [] when there is no file.

    A resumed run first drops the rows written after its checkpoint: they will be made again.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [line for i, line in enumerate(lines) if i == 0 or (line and int(line.split(",", 1)[0]) < epoch)]


def say(message: str) -> None:
    """One plain line to the user, on stderr: stdout is for figures. Of processes that work together the first speaks."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[T], total: int, label: str, every: float = 15.0) -> Iterator[T]:
    """``items`` again, with rate and time left on stderr: a bar on a terminal, else a plain line every so often."""
    if sys.stderr.isatty() and is_first():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=label, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every and done < total:
            rate, last = done / (now - start), now
            say(f"{label}: {done}/{total}, {rate:.2f}/s, {(total - done) / rate:.0f} s left")

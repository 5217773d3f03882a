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
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from autoreid.errors import UserError
from autoreid.options import read_json

T = TypeVar("T")
PACKAGES = ("autoreid", "torch", "torchvision", "numpy", "pandas", "pillow", "safetensors")


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
    return " ".join([Path(sys.argv[0]).name.replace("__main__.py", "autoreid"), *sys.argv[1:]])


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
    """Peak resident memory of this process, in bytes (Linux counts kilobytes, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def folder_name(dataset: str) -> str:
    """A dataset's name as that of a folder: ``cuhk03/labeled`` is ``cuhk03-labeled``."""
    return dataset.replace("/", "-")


# ---------------------------------------------------------------------------------------- one run's folder
class Run:
    """The folder of one long command: what it was asked, where it stands, what it found.

    ``config.json`` says what was asked, ``environment.json`` where it ran; ``checkpoint.pt`` holds the exact state of
    the last whole epoch, ``summary.json`` is written last and says that the run is finished.

    Making a Run only looks: a folder with a ``config.json`` is refused without ``resume`` or ``overwrite``, and
    ``resume`` accepts only the same question. Nothing is written before :meth:`open`, which the work calls when all
    that the user gave has been found good. ``results`` are files elsewhere that belong to the run.
    """

    FILES = ("config.json", "environment.json", "checkpoint.pt", "summary.json", "genotype.json", "curves.csv",
             "alphas.csv", "genotype.png", "alphas.png", "curves.png", "swag.safetensors")

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool, results: Sequence[Path] = ()
    ) -> None:
        self.folder, self.results, self.overwrite = Path(folder), tuple(results), overwrite
        self.config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
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
        for path in (*results, *(folder / name for name in reversed(cls.FILES))):
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
        now, then = _flat(self.config), _flat(before)
        for name in sorted({*now, *then}):
            if then.get(name) != now.get(name):
                raise UserError(
                    f"--resume: {self.folder} was started with {name}={then.get(name)}, now {name}={now.get(name)}: "
                    "give the same options, or --overwrite to start anew"
                )

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the exact state, whole or not at all; tensors and plain values only (read with weights_only)."""
        import torch

        buffer = io.BytesIO()  # in memory first: torch hides a full disk behind an error of its own
        torch.save(dict(state), buffer)
        write_bytes(self.checkpoint, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None for a run that has none (a new one, or one stopped in its first epoch)."""
        import torch

        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as fault:  # torch raises many kinds for a damaged file
            raise UserError(
                f"{self.checkpoint} cannot be read ({type(fault).__name__}): it is damaged; "
                f"start the run anew with --overwrite"
            ) from fault


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
    """One plain line to the user, on stderr: stdout is for figures."""
    print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[T], total: int, label: str, every: float = 15.0) -> Iterator[T]:
    """``items`` again, with rate and time left on stderr: a bar on a terminal, else a plain line every so often."""
    if sys.stderr.isatty():
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

"""What the README says is true: its Python runs, its commands parse, its files and make targets exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import planted
import pytest

from autoreid.cli import build_parser, main

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(path: Path) -> list[str]:
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


AUTOREID = [c for path in (README, CONTRIBUTING) for c in commands(path) if c.startswith("autoreid ")]


def test_there_is_something_to_test():
    assert len(AUTOREID) >= 8 and blocks(README, "python") and len(blocks(CONTRIBUTING, "python")) >= 5


@pytest.mark.parametrize("command", AUTOREID)
def test_every_command_parses(command):
    try:
        build_parser().parse_args(shlex.split(command)[1:])
    except SystemExit as end:  # --help
        assert end.code == 0


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for path in (README, CONTRIBUTING):
        for command in commands(path):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


def test_every_file_named_exists():
    for path in (README, CONTRIBUTING):
        for name in re.findall(r"\]\(([\w./-]+\w)\)", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} points to {name}"


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """On a small folder in Market's layout, with the weights the snippet names trained for one epoch."""
    planted.write_dataset(tmp_path / "data", planted.texture, identities=6, test_identities=3)
    monkeypatch.chdir(tmp_path)
    assert main([
        "retrain", "random-reid", "--dataset", "market", "--root", "data", "--epochs", "1", "--input", "32x16",
        "--set", "identities=3", "--set", "images=2", "--set", "channels=4", "--set", "layers=1,1", "--name", "searched",
    ]) == 0  # fmt: skip
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_the_contributing_examples_run(tmp_path):
    """In a process of their own: they add lines to the package's tables."""
    script = "\n".join(f"exec(compile({code!r}, 'example {i}', 'exec'), {{}})"
                       for i, code in enumerate(blocks(CONTRIBUTING, "python")))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What the README says is true: its Python runs, its commands parse, its files and make targets exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest

from autoreid.cli import build_parser, main

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING, TRAINING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/training.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(path: Path) -> list[str]:
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


AUTOREID = [c[c.index("autoreid ") :] for path in (README, CONTRIBUTING, TRAINING) for c in commands(path)
            if re.match(r"(torchrun .* -m )?autoreid ", c)]


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


SMALL = {  # the README's commands are for real data and a GPU; these make them minutes shorter, not others
    "search": ["--epochs", "2", "--input", "32x16", "--set", "channels=4", "--set", "layers=1,1", "--set", "identities=3",
               "--set", "images=2"],
    "retrain": ["--epochs", "1", "--input", "32x16", "--set", "identities=3", "--set", "images=2"],
    "cost": ["--no-latency"],
    "compress": ["--methods", "slice,pca", "--dims", "32", "--epochs", "1", "--input", "32x16", "--set", "identities=3",
                 "--set", "images=2"],
    "export": ["--min-cosine", "0"],  # of a network of one epoch
    "tune": ["--trials", "1", "--fields", "flip", "--panel", "resnet18:stem=3:width=4", "--epochs", "1", "--input", "32x16",
             "--set", "identities=2", "--set", "images=2"],
}  # fmt: skip


def test_the_readmes_own_data_section_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Every autoreid command in the README's order, then its Python, in a home with a small folder like Market's."""
    home = tmp_path / "home"
    planted.write_dataset(home / "data", planted.texture, identities=8, test_identities=3)
    planted.write_dataset(home / "data", planted.texture, identities=4, test_identities=3, layout="veri")
    rng, [sample] = np.random.default_rng(0), blocks(README, "csv")
    (home / "people").mkdir()
    for identity in range(12):
        for n in range(4):
            path = home / "people" / f"name {identity:02d}" / f"{identity}_c{n % 2}_{n}.jpg"
            path.parent.mkdir(exist_ok=True)
            planted.Image.fromarray(planted.texture(rng, identity)).save(path)
    rows = [f"van/{n:04d}.jpg,van-{n},{camera},{part}" for n, (part, camera) in enumerate(
        (("query", "gate"), ("gallery", "yard"), ("gallery", "gate")), start=3)]
    rows = [row.replace("van-4", "van-3") for row in rows]
    (home / "vans.csv").write_text(sample + "\n".join(rows))
    (home / "van").mkdir()
    for n in range(1, 6):
        planted.Image.fromarray(planted.texture(rng, n)).save(home / "van" / f"{n:04d}.jpg")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    features = {"features": np.eye(2, dtype=np.float32), "identities": np.array([1, 2])}
    np.savez("query.npz", **features, cameras=np.array([1, 1]))
    np.savez("gallery.npz", **features, cameras=np.array([2, 2]))
    planted.Image.fromarray(planted.texture(rng, 3)).save("query.jpg")
    model = {"model": "resnet18", "set": {"stem": 3, "width": 4}}
    Path("panel.json").write_text(json.dumps({
        "models": [model], "datasets": ["market"], "seeds": [0], "recipe": "drawn",
        "set": {"epochs": 1, "input": [32, 16], "identities": 3, "images": 2},
    }))
    for command in (c for c in commands(README) if c.startswith("autoreid ") and "--help" not in c):
        argv = [word.replace("~", str(home)) for word in shlex.split(command)[1:]]
        assert main([*argv, *SMALL.get(argv[0], [])]) == 0, command
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_the_readmes_camera_pattern_is_json_and_fits():
    [written] = re.findall(r"`(\{\"camera\".*?\})`", README.read_text())
    assert re.fullmatch(json.loads(written)["camera"], "cam17")


def test_the_readmes_genotype_table_follows_from_its_command(capsys):
    text = README.read_text().replace("\n", " ")
    found = re.search(r"figures \(`(.*?)` and, for the classifier, ([\d,]+) .*? and ([\d,]+) MACs", text)
    command, params, macs = found.groups()
    assert main([*shlex.split(command)[1:], "--no-latency", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    counted = (f"{row[name] + int(more.replace(',', '')):,}" for name, more in (("params", params), ("macs", macs)))
    assert f"| darts-v2 | {' | '.join(counted)} |" in text


def test_the_contributing_examples_run(tmp_path):
    """In a process of their own: they add lines to the package's tables."""
    script = "\n".join(f"exec(compile({code!r}, 'example {i}', 'exec'), {{}})"
                       for i, code in enumerate(blocks(CONTRIBUTING, "python")))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_json_of_the_guide_is_a_recipe_and_a_sweep(tmp_path, monkeypatch):
    from autoreid.recipe import find_recipe
    from autoreid.sweep import Sweep

    monkeypatch.chdir(ROOT)  # the sweep names genotypes of the repository
    recipe, sweep = blocks(TRAINING, "json")
    for name, text in (("recipe.json", recipe), ("panel.json", sweep)):
        (tmp_path / name).write_text(text)
    assert find_recipe(str(tmp_path / "recipe.json")).ema == 0.99
    sweep = Sweep.read(tmp_path / "panel.json")
    assert len(sweep.jobs) == 9

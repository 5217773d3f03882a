"""Files whole or not at all, and a run's folder that is never written over."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from autoreid.errors import UserError, unknown
from autoreid.options import read_json
from autoreid.runs import (
    Run,
    asked_to_stop,
    command,
    environment,
    heeding_sigterm,
    key_of,
    rows_up_to,
    whole_file,
    without_password,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"mAP": 0.5})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"mAP": float("nan")})
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert json.loads(path.read_text()) == {"mAP": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import os

    write_text(tmp_path / "curves.csv", "epoch\n")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "curves.csv", "epoch\n0\n")
    assert (tmp_path / "curves.csv").read_text() == "epoch\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_read_json_names_the_fault(tmp_path):
    with pytest.raises(UserError, match="r.json: no such recipe file"):
        read_json(tmp_path / "r.json", "recipe")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="r.json: not valid JSON"):
        read_json(tmp_path / "r.json", "recipe")


def test_a_run_is_not_written_over_and_resumes_only_the_same_question(tmp_path):
    run = Run(tmp_path / "run", {"lr": 0.1, "layers": (1, 2)}, resume=False, overwrite=False)
    assert run.load() is None and not run.folder.exists()  # looking writes nothing
    run.open()
    run.save({"epoch": 3, "weights": torch.ones(2)})
    with pytest.raises(UserError) as fault:
        Run(tmp_path / "run", {"lr": 0.1, "layers": (1, 2)}, resume=False, overwrite=False)
    assert str(fault.value) == (
        f"{tmp_path / 'run'} already holds an unfinished run: add --resume to go on with it, --overwrite to start it "
        "anew, or write elsewhere with --out DIR"
    )
    with pytest.raises(UserError) as fault:
        Run(tmp_path / "run", {"lr": 0.2, "layers": (1, 2)}, resume=True, overwrite=False)
    assert str(fault.value) == (
        f"--resume: {tmp_path / 'run'} was started with lr=0.1, now lr=0.2: give the same options, or --overwrite to "
        "start anew"
    )
    again = Run(tmp_path / "run", {"lr": 0.1, "layers": (1, 2)}, resume=True, overwrite=False)
    assert again.load()["epoch"] == 3
    anew = Run(tmp_path / "run", {"lr": 0.2, "layers": (1, 2)}, resume=False, overwrite=True)
    anew.open()
    assert anew.load() is None and json.loads((anew.folder / "config.json").read_text())["lr"] == 0.2


def saved_twice(tmp_path) -> Run:
    run = Run(tmp_path / "run", {}, resume=False, overwrite=False)
    run.open()
    run.save({"epoch": 1, "weights": torch.arange(1000.0)})
    run.save({"epoch": 2, "weights": torch.arange(1000.0) + 1})
    return run


def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, capsys):
    run = saved_twice(tmp_path)
    assert run.load()["epoch"] == 2 and capsys.readouterr().err == ""
    data = run.checkpoint.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"PK not really", data.replace(torch.tensor([5.0, 6.0]).numpy().tobytes(),
                                                                               torch.tensor([5.0, 7.0]).numpy().tobytes())):
        assert damaged != data
        run.checkpoint.write_bytes(damaged)
        state = run.load()
        assert state["epoch"] == 1 and torch.equal(state["weights"], torch.arange(1000.0))
        warned = capsys.readouterr().err.splitlines()
        assert warned[0].startswith(f"warning: {run.checkpoint} cannot be read") and warned[0].endswith("it is damaged")
        assert warned[1] == f"warning: going on from the state before, {run.folder / 'checkpoint.before.pt'}"
    run.checkpoint.unlink()  # killed between the two renames
    assert run.load()["epoch"] == 1


def test_one_flipped_bit_is_found_even_where_the_file_still_opens(tmp_path, capsys):
    run = saved_twice(tmp_path)
    sealed = torch.load(run.checkpoint, weights_only=True)
    assert len(sealed["sha256"]) == 64
    sealed["state"][len(sealed["state"]) // 2] ^= 1
    torch.save(sealed, run.checkpoint)
    assert run.load()["epoch"] == 1
    assert "its SHA-256 differs from the one written in it" in capsys.readouterr().err


def test_where_both_states_are_damaged_it_says_so(tmp_path):
    run = saved_twice(tmp_path)
    for path in run.folder.glob("checkpoint*"):
        path.write_bytes(b"PK not really")
    words = "checkpoint.pt and .*checkpoint.before.pt cannot be read: damaged; start the run anew with --overwrite"
    with pytest.raises(UserError, match=words):
        run.load()


def test_sigterm_only_sets_a_flag_within_the_block():
    assert not asked_to_stop()
    with heeding_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked_to_stop()
    assert not asked_to_stop() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_environment_names_versions_commit_and_command():
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "numpy", "processor", "cores", "commit", "command"} <= set(found)


def test_no_password_is_recorded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/autoreid", "tune", "--storage", "postgresql://me:secret@host:5432/db"])
    assert command() == "autoreid tune --storage postgresql://me:***@host:5432/db"
    assert without_password("a postgresql://me:p@s:s@host/db?x=1&password=secret&y=2 b") == (
        "a postgresql://me:***@host/db?x=1&password=***&y=2 b")


def test_keys_do_not_depend_on_order():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def test_rows_made_after_the_checkpoint_are_dropped(tmp_path):
    assert rows_up_to(tmp_path / "none.csv", 3) == []
    (tmp_path / "c.csv").write_text("epoch,x\n0,a\n1,b\n2,c\n")
    assert rows_up_to(tmp_path / "c.csv", 2) == ["epoch,x", "0,a", "1,b"]


def test_unknown_gives_the_nearest_name():
    near = unknown("op", "sep_con", ["sep_conv", "id"])
    assert str(near) == "unknown op 'sep_con'; did you mean 'sep_conv'? known: id, sep_conv"
    assert str(unknown("op", "zzz", ["id"])) == "unknown op 'zzz'; known: id"


def test_importing_the_package_needs_no_torch():
    code = "import sys, autoreid.cli, autoreid.data; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overwriting_takes_every_old_file_away_before_the_new_question(tmp_path):
    """A kill right after leaves no old genotype, curve or result that could pass for the new run's."""
    result = tmp_path / "model-s0.json"
    run = Run(tmp_path / "run", {"lr": 1}, resume=False, overwrite=False, results=[result])
    run.open()
    for name in Run.FILES[1:]:
        (run.folder / name).write_text("old")
    result.write_text("old")
    (run.folder / ".checkpoint.pt.k3jd9a").write_text("of a killed process")
    (run.folder / "notes.txt").write_text("the user's own")
    Run(tmp_path / "run", {"lr": 2}, resume=False, overwrite=True, results=[result]).open()
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.json", "environment.json", "notes.txt"]
    assert not result.exists()


def test_a_result_without_its_run_is_not_written_over(tmp_path):
    result = tmp_path / "model-s0.json"
    result.write_text("{}")
    for resume in (False, True):
        with pytest.raises(UserError) as fault:
            Run(tmp_path / "run", {}, resume=resume, overwrite=False, results=[result])
        assert str(fault.value) == (
            f"{result} is there already: add --overwrite to make it anew, or write elsewhere with --out DIR or --name NAME")


def test_a_nested_difference_is_named_alone(tmp_path):
    Run(tmp_path, {"recipe": {"lr": 1, "pad": 2}}, resume=False, overwrite=False).open()
    with pytest.raises(UserError, match=r"was started with recipe\.lr=1, now recipe\.lr=3: give the same options"):
        Run(tmp_path, {"recipe": {"lr": 3, "pad": 2}}, resume=True, overwrite=False)

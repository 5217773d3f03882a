"""Two real processes joined by torchrun and gloo against one: values, gradients, batch norms, training, evaluation."""

import json
import os
import signal
import time

import joined
import parallel_checks
import planted
import pytest
import torch
from safetensors.torch import load_file

from autoreid import parallel
from autoreid.errors import UserError
from autoreid.runs import Run

CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, and what two processes found in every check."""
    folder = tmp_path_factory.mktemp("parallel")
    planted.write_dataset(folder / "market", planted.texture, identities=8, test_identities=5)
    (folder / "broken.jpg").write_bytes(b"no picture")
    status, output = joined.run([parallel_checks.__file__, str(folder)])
    assert status == 0, output
    return folder


def found(folder, check):
    """(rank 0's, rank 1's) of two processes and what one process finds."""
    torch.manual_seed(0)
    alone = getattr(parallel_checks, check)(folder)
    return *(torch.load(folder / f"{check}-{rank}.pt", weights_only=False) for rank in (0, 1)), alone


def test_messages(folder):
    first, second, alone = found(folder, "messages")
    for two in (first, second):
        assert [value["rank"] for value in two["objects"]] == [0, 1] and [len(v["x"]) for v in two["objects"]] == [1, 2]
        assert two["agree"] == [True, False] and two["from_first"] == "made by 0" and two["raised"] == "division by zero"
        assert torch.equal(two["average"][0], torch.full((2, 2), 0.5)) and two["average"][1] is None
        assert torch.equal(two["average"][2], torch.ones(3, dtype=torch.float64))
        assert torch.equal(two["broadcast"], torch.full((2, 2), 5.0))
    assert len(alone["objects"]) == 1 and alone["agree"] == [False, False] and alone["raised"] == "division by zero"


def test_a_loss_of_all_rows_has_the_gradient_of_one_process(folder):
    first, second, alone = found(folder, "gathered")
    for two in (first, second):
        torch.testing.assert_close(two, alone, rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norms_are_those_of_the_whole_batch(folder):
    first, second, alone = found(folder, "batch_norms")
    for name, (outs, gradients, state) in alone.items():
        for two in (first[name], second[name]):
            torch.testing.assert_close(two[0], outs, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(two[1], gradients, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(two[2], state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "accumulated", "ema"])
def test_ten_steps_of_two_processes_are_those_of_one(folder, name):
    first, second, alone = found(folder, "steps")
    for two in (first, second):
        assert two[f"{name} gradients"].keys() == alone[f"{name} gradients"].keys()
        torch.testing.assert_close(two[f"{name} gradients"], alone[f"{name} gradients"], **CLOSE)
        # a center's gradient is a sum of features, some of them above 1: the last bits of float32 are larger there
        torch.testing.assert_close(two[f"{name} centers"], alone[f"{name} centers"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two[name], alone[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(two[f"{name} losses"], alone[f"{name} losses"], rtol=0, atol=1e-4)
    assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())


def test_features_are_bit_equal_whoever_extracts_them(folder):
    first, second, alone = found(folder, "features")
    assert alone["bad"] == 1 and alone["kept"] == 9
    for two in (first, second):
        assert all(torch.equal(two[name], alone[name]) for name in ("pictures", "tracklets", "readable"))
        assert (two["kept"], two["bad"]) == (9, 1)


def test_all_processes_end_with_one_net_and_one_figure(folder):
    first, second, alone = found(folder, "training")
    assert all(torch.equal(value, second["net"][key]) for key, value in first["net"].items())
    assert first["told"] == second["told"] and len(first["told"]) == 3  # two epochs, and the average
    assert first["val_mAP"] == second["val_mAP"] == first["told"][-1][1] and first["processes"] == 2
    assert alone["processes"] == 1 and len(alone["told"]) == 3


def test_without_torchrun_there_is_one_process(monkeypatch):
    assert parallel.start("cpu") == "cpu" and parallel.rank() == 0 and parallel.processes() == 1 and parallel.is_first()
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it without meaning us
    assert parallel.start("cpu") == "cpu" and parallel.processes() == 1


def test_a_numbered_gpu_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    words = "--device cuda:1: with torchrun each process has a GPU of its own; give --device cuda"
    with pytest.raises(UserError, match=words):
        parallel.start("cuda:1")


# ---------------------------------------------------------------------------------------- the command
def retrain(folder, *options):
    return ["-m", "autoreid", "retrain", "resnet18", "--dataset", "market", "--root", str(folder / "market"),
            "--device", "cpu", "--recipe", "drawn", "--set", "width=4", "--set", "stem=3", "--input", "32x16",
            "--set", "identities=4", "--set", "images=2", "--set", "warmup_epochs=0", "--epochs", "3", "--set", "ema=0.9",
            "--name", "net", *options]


def test_the_command_trains_evaluates_and_writes_once(folder, tmp_path):
    status, output = joined.run(retrain(folder, "--out", str(tmp_path)))
    assert status == 0, output
    result = json.loads((tmp_path / "market" / "net-s0.json").read_text())
    assert result["train"]["processes"] == 2
    assert result["environment"]["command"].startswith("torchrun --nproc-per-node 2 -m")
    assert output.count("epoch 3/3") == 1 and output.count("result in") == 1
    status, evaluated = joined.run(["-m", "autoreid", "evaluate", str(tmp_path / "market" / "net-s0.safetensors"),
                                    "--dataset", "market", "--root", str(folder / "market"), "--device", "cpu", "--json"])
    assert status == 0, evaluated
    line = next(line for line in evaluated.splitlines() if line.startswith("{"))
    assert json.loads(line)["mAP"] == result["mAP"]


def test_identities_that_cannot_be_shared_out_are_refused_by_all(folder, tmp_path):
    begin = time.monotonic()
    status, output = joined.run(retrain(folder, "--out", str(tmp_path), "--set", "identities=3"))
    assert status != 0 and time.monotonic() - begin < 60
    assert "identities=3: allowed is a multiple of 2, the number of processes" in output


@pytest.mark.parametrize(("fault", "words"), [
    ("train.UserError('planted in one process')", "autoreid: planted in one process"),
    ("MemoryError()", "autoreid: out of memory; take a smaller network"),
])
def test_one_failed_process_ends_all_with_its_error(folder, tmp_path, fault, words):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\nfrom autoreid import cli, parallel, train\n"
        "step = train.Learner.step\n"
        "def fails(learner, batches):\n"
        "    if parallel.rank() == 1:\n"
        f"        raise {fault}\n"
        "    return step(learner, batches)\n"
        "train.Learner.step = fails\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    begin = time.monotonic()
    status, output = joined.run([str(script), *retrain(folder, "--out", str(tmp_path))[2:]])
    assert status != 0 and time.monotonic() - begin < 60
    assert words in output
    assert not (tmp_path / "market" / "net-s0.json").exists()


def test_sigterm_saves_and_the_resumed_training_ends_in_the_same_state(folder, tmp_path):
    """A real SIGTERM to torchrun in mid-training, and the rest. Against a training that was never stopped."""
    whole = retrain(folder, "--out", str(tmp_path / "whole"), "--epochs", "30")
    # with the loader's own processes, which torchrun's signal reaches too
    stopped = retrain(folder, "--out", str(tmp_path / "stopped"), "--epochs", "30", "--workers", "1")
    status, output = joined.run(whole)
    assert status == 0, output
    process = joined.start(stopped)
    for line in process.stdout:
        if line.startswith("epoch 4/30"):
            os.kill(process.pid, signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM; the state is saved, resume with: torchrun --nproc-per-node 2 -m autoreid retrain" in rest
    assert not (tmp_path / "stopped" / "market" / "net-s0.json").exists()
    status, output = joined.run([*stopped, "--resume"])
    assert status == 0 and "resumed after epoch" in output
    weights, again = (load_file(tmp_path / name / "market" / "net-s0.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    run = tmp_path / "stopped" / "market" / "net-s0"
    asked = json.loads((run / "config.json").read_text())
    assert asked.pop("processes") == 2
    with pytest.raises(UserError, match="started with processes=2, now processes=1"):
        Run(run, asked, resume=True, overwrite=False)

"""Two real processes that search together against one: steps, alphas, what is written, SIGTERM and a failure."""

import csv
import io
import os
import signal
import threading
import time
from dataclasses import replace

import joined
import planted
import pytest
import search_checks
import torch
from search_checks import SETTINGS, SPACE, VARIANTS, samples

import autoreid.search
from autoreid import parallel
from autoreid.errors import UserError
from autoreid.runs import Preempted, Run, heeding_sigterm
from autoreid.search import search, search_config, search_data

CHECKS = search_checks.__file__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, what two processes found in every check, their search in ``whole``, and the ``stopped`` one."""
    folder = tmp_path_factory.mktemp("search")
    planted.write_dataset(folder / "market", planted.texture, identities=10, frames=6)
    status, output = joined.run([CHECKS, "checks", str(folder)], timeout=600)
    assert status == 0, output
    assert output.count("epoch 3/3") == 1 and output.count("stopped") == 2  # one speaks, both stop
    return folder


def of_both(folder, check):
    return [torch.load(folder / f"{check}-{rank}.pt", weights_only=False) for rank in (0, 1)]


def same(a, b) -> bool:
    """Bit for bit, through lists and dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def largest(gradients) -> float:
    return max(float(g.abs().max()) for g in gradients if g is not None)


# ---------------------------------------------------------------------------------------- the steps
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}".replace("torch.", ""))
def test_steps_of_two_processes_are_those_of_one(folder, variant):
    """At the same global batch: gradients of weights and alphas, which operations have none, losses, weights."""
    method, dtype, lr = variant
    first, second = (found[variant] for found in of_both(folder, "equal_steps"))
    assert same(first, second)
    alone = search_checks.some_steps(replace(SETTINGS, method=method, lr=lr), dtype)
    single = dtype == torch.float
    close = {"rtol": 0, "atol": 1e-6 if single else 1e-11}
    for kind in ("weight gradients", "alpha gradients"):
        for found, expected in list(zip(first[kind], alone[kind], strict=True))[: 1 if single else None]:
            assert [g is None for g in found] == [g is None for g in expected]
            torch.testing.assert_close([g for g in found if g is not None], [g for g in expected if g is not None], **close)
        assert largest(alone[kind][0]) > 1e-3  # 1e-6 says something
    close = {"rtol": 0, "atol": 1e-5 if single else 1e-11}
    for name in ("weights", "alphas", "losses"):
        torch.testing.assert_close(first[name], alone[name], **close)
    torch.testing.assert_close([b.double() for b in first["buffers"]], [b.double() for b in alone["buffers"]], **close)
    assert (method == "gdas") == any(g is None for g in alone["weight gradients"][0])


@pytest.mark.parametrize("gather", [True, False])
def test_alphas_and_weights_stay_bit_equal_though_batch_norms_and_dropout_differ(folder, gather):
    first, second = (found[gather] for found in of_both(folder, "own_norms"))
    assert len(first["alphas"]) == 10 and not same(first["alphas"][0], first["alphas"][-1])
    for name in ("alphas", "weights", "weight gradients", "alpha gradients", "losses"):
        assert same(first[name], second[name]), name
    assert not same(first["buffers"], second["buffers"])  # or the test would not have had processes that differ


def test_each_process_drops_other_units_and_all_draw_the_same_operations(folder):
    (dropped, drawn), (other, same_drawn) = (found["noise"] for found in of_both(folder, "own_norms"))
    assert not torch.equal(dropped, other) and torch.equal(drawn, same_drawn)


def test_one_net_is_validated(folder):
    """Its statistics were each process's own until then."""
    (figures, first), (others, second) = (found["validation"] for found in of_both(folder, "own_norms"))
    assert figures == others and same(first, second)


def test_gather_decides_whose_triplets_they_are(folder):
    together, apart = (of_both(folder, "own_norms")[0][gather]["losses"][0] for gather in (True, False))
    assert together[0] == apart[0] and together[1] > apart[1]  # fewer negatives: an easier batch


def test_a_search_of_two_processes_from_the_disk_is_that_of_one(folder):
    first, second = of_both(folder, "loaded")
    alone = search_checks.loaded(folder)
    assert first == second
    (row,), (expected,) = (list(csv.DictReader(io.StringIO(found["curves"]))) for found in (first, alone))
    for name in ("loss_ce", "loss_triplet", "loss_alpha", "entropy_normal", "entropy_reduction"):
        assert float(row[name]) == pytest.approx(float(expected[name]), rel=2e-5), name
    assert row["val_mAP"] == expected["val_mAP"]


def test_a_process_of_one_identity_has_no_negative_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 4)
    with pytest.raises(UserError) as fault:
        search_data(samples(folder), replace(SETTINGS, gather=False), seed=0)
    assert str(fault.value) == ("identities=4: allowed is 8 or more for 4 processes with gather=false: a triplet needs a "
                                "negative")


def test_settings_that_older_searches_did_not_have_do_not_change_their_question():
    asked = search_config("market", SPACE, replace(SETTINGS, sync_bn=False), 0, "cpu", 9)["settings"]
    assert "sync_bn" not in asked and "gather" not in asked and asked["eval_every"] == 1
    asked = search_config("market", SPACE, replace(SETTINGS, gather=False), 0, "cpu", 9)["settings"]
    assert asked["sync_bn"] is True and asked["gather"] is False


# ---------------------------------------------------------------------------------------- SIGTERM
def state_of(folder):
    """The last state saved, but for what it took."""
    state = Run._read(folder / "checkpoint.pt")
    return {name: value for name, value in state.items() if name not in ("seconds", "memory")}


def assert_same_search(one, other):
    assert same(state_of(one), state_of(other))
    for name in ("genotype.json", "alphas.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    rows = [[{k: v for k, v in row.items() if k not in ("seconds", "memory_bytes")}
             for row in csv.DictReader((run / "curves.csv").open())] for run in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


@pytest.mark.parametrize(("method", "where"), [("darts-2", "step 7"), ("gdas", "step 2"), ("gdas", "validation 1")])
def test_sigterm_anywhere_and_the_resumed_search_ends_in_the_same_state(folder, tmp_path, monkeypatch, method, where):
    """One process. Five steps an epoch, the alphas' from the second epoch on."""
    settings = replace(SETTINGS, method=method, dropout=0.3)

    def run(name, resume=False):
        with heeding_sigterm():
            search(SPACE, samples(folder), settings, Run(tmp_path / name, {}, resume=resume, overwrite=False))

    run("whole")
    what, number = where.split()
    name = {"step": "weight_step", "validation": "validate"}[what]
    calls, original = 0, getattr(autoreid.search, name)

    def terminated(*arguments):
        nonlocal calls
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGTERM)
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(autoreid.search, name, terminated)
    with pytest.raises(Preempted):
        run("stopped")
    state = state_of(tmp_path / "stopped")
    assert (state["epoch"], state["batch"]) == {"step 7": (1, 3), "step 2": (0, 3), "validation 1": (1, 5)}[where]
    assert not (tmp_path / "stopped" / "summary.json").exists()
    monkeypatch.undo()
    run("stopped", resume=True)
    assert_same_search(tmp_path / "stopped", tmp_path / "whole")


@pytest.fixture(scope="module")
def later(folder):
    """New processes: the stopped search to its end, then one that fails. Status, output, seconds from fault to end."""
    stopped = state_of(folder / "stopped")
    process, lines, begin = joined.start([CHECKS, "later", str(folder)]), [], None
    hung = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
    hung.start()
    for line in process.stdout:
        lines.append(line)
        begin = time.monotonic() if "planted" in line and begin is None else begin
    hung.cancel()
    return process.wait(60), "".join(lines), time.monotonic() - (begin or 0), stopped


def test_two_processes_stopped_by_sigterm_and_resumed_end_in_the_same_state(folder, later):
    """A real SIGTERM to one of them in mid-epoch stopped both; new processes went on."""
    _, output, _, stopped = later
    assert (stopped["epoch"], stopped["batch"]) == (1, 2) and len(stopped["searcher"]["rng"]) == 2
    assert "resumed after epoch 1 and 2 batches of 3" in output
    assert_same_search(folder / "stopped", folder / "whole")


def test_one_failed_process_ends_all_with_its_error(folder, later):
    """The other waits for its part, and would for half an hour."""
    status, output, seconds, _ = later
    assert status != 0 and seconds < 25
    assert "autoreid: planted in process 1\n" in output
    assert not (folder / "failed" / "summary.json").exists()

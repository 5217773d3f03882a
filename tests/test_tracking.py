"""The CSV of a run and TensorBoard's events."""

import importlib.util

import pytest

from autoreid.tracking import Curves


def test_rows_are_written_whole_and_a_resumed_run_drops_the_later_ones(tmp_path):
    curves = Curves(tmp_path, "loss,val_mAP", 0, tensorboard=False)
    for epoch in range(3):
        curves.add(epoch, {"loss": 1 / 3 + epoch, "val_mAP": None if epoch == 1 else 0.5})
    assert curves.path.read_text() == "epoch,loss,val_mAP\n0,0.333333,0.5\n1,1.33333,\n2,2.33333,0.5\n"
    again = Curves(tmp_path, "loss,val_mAP", 2, tensorboard=False)
    assert again.read("val_mAP") == [(0, 0.5), (1, None)]
    again.add(2, {"loss": 7.0, "val_mAP": None})
    assert curves.path.read_text().splitlines()[-1] == "2,7,"


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed (the extra `log`)")
def test_tensorboard_reads_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 3), (2, 4)):  # the second begins again after the checkpoint of epoch 2
        curves = Curves(tmp_path, "loss,val_mAP", first)
        for epoch in range(first, last):
            curves.add(epoch, {"loss": float(10 * first + epoch), "val_mAP": 0.25 if epoch == 1 else None})
        curves.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 22), (3, 23)]
    assert [(e.step, e.value) for e in events.Scalars("val_mAP")] == [(1, 0.25)]


def test_without_tensorboard_the_csv_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    curves = Curves(tmp_path, "loss", 0)
    curves.add(0, {"loss": 1.0})
    curves.close()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.csv"]

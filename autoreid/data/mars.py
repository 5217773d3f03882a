"""MARS on disk (Zheng et al., "MARS: A Video Benchmark for Large-Scale Person Re-identification", ECCV 2016).

A sample is a tracklet. ``info/train_name.txt`` and ``test_name.txt`` list the frames, ``0001C1T0001F001.jpg``, which lie
in ``bbox_train/0001/`` and ``bbox_test/`` (the folder is the first four letters, ``00-1`` for junk). A row of
``info/tracks_{train,test}_info.mat`` is a tracklet: first frame, last frame (both included, from 1), identity, camera.
``info/query_IDX.mat`` names the rows that ask.

The official gallery (``test_mars.m`` of the authors' MARS-evaluation) is every test tracklet, those that ask too: 12,180,
and 11,310 without junk. Taking the queries out, as some toolkits do, leaves 140 of them without any answer.
"""

from __future__ import annotations

import os

from autoreid.data.layout import Layout, Reading, Sample
from autoreid.data.mat_files import load_mat, whole_numbers
from autoreid.data.text import lines_of
from autoreid.errors import UserError

QUERY = "info/query_IDX.mat"
TEST = ("info/test_name.txt", "info/tracks_test_info.mat", "bbox_test")
PARTS = {
    "train": ("info/train_name.txt", "info/tracks_train_info.mat", "bbox_train"),
    "query": (*TEST, QUERY),
    "gallery": TEST,
}


def _read(folder: str, part: str) -> Reading:
    names, tracks, images = PARTS[part][:3]
    path = os.path.join(folder, tracks)
    side = "train" if part == "train" else "test"
    rows = whole_numbers(path, load_mat(path), f"track_{side}_info", f"tracks_{side}_info")
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise UserError(
            f"{path} is a table of {' x '.join(map(str, rows.shape))} and must have 4 columns (first frame, last frame, "
            "identity, camera); copy info/ again"
        )
    files, place = [name for _, name in lines_of(os.path.join(folder, names))], os.path.join(folder, images)
    samples = [_tracklet(row, number, files, place, path) for number, row in enumerate(rows.tolist(), 1)]
    if part == "query":
        path = os.path.join(folder, QUERY)
        asking = whole_numbers(path, load_mat(path), "query_IDX").flatten().tolist()
        if not all(1 <= row <= len(samples) for row in asking):
            raise UserError(f"{path} names tracklets beyond the {len(samples)} of {tracks}; copy info/ again")
        samples = [samples[row - 1] for row in asking]
    return Reading(samples, [])


def _tracklet(row: list[int], number: int, files: list[str], images: str, path: str) -> Sample:
    first, last, identity, camera = row
    if not 1 <= first <= last <= len(files):
        raise UserError(
            f"{path} row {number} is frames {first} to {last} of {len(files)} in the list of names; copy info/ again"
        )
    frames = tuple(os.path.join(images, name[:4], name) for name in files[first - 1 : last])
    return Sample(frames[0], identity, camera, frames)


LAYOUT = Layout(
    "MARS",
    "mars",
    ("mars", "MARS"),
    PARTS,
    _read,
    {"train": 8_298, "query": 1_980, "gallery": 12_180},
    {"train": 625, "query": 626, "gallery": 634},
    6,
    "0001C1T0001F001.jpg",
    unit="tracklets",
)

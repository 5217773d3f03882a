"""MSMT17 on disk (Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-identification", CVPR 2018).

Four lists, ``list_{train,val,query,gallery}.txt``, of lines ``0000/0000_000_01_0303morning_0015_0.jpg 0``: a path, and
an identity from 0. The camera (1 to 15) is the third field of the file name. Train and test both count from 0, other
people each: test identities are moved up here, so that nobody joins the two on a number.

V1 keeps its images in ``train`` and ``test``, V2 (faces blurred: other data, other scores) in ``mask_train_v2`` and
``mask_test_v2`` (or ``_V2``). The lists lie beside the images, or one folder up, directly under ``MSMT17/``.

Half of the literature trains on ``list_train`` alone (30,248 images: torchreid, fast-reid), half adds ``list_val``
(32,621: TransReID, CLIP-ReID): the first is ``msmt17``, the second ``msmt17/train+val``.
"""

from __future__ import annotations

import os
import re
from functools import partial

from autoreid.data.layout import Layout, Reading, Sample
from autoreid.data.text import bad_line, rows_of

FOLDERS = (
    "msmt17/MSMT17_V1", "MSMT17/MSMT17_V1", "msmt17/MSMT17_V2", "MSMT17/MSMT17_V2",
    "MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17",
)  # fmt: skip
EXAMPLE = "0000/0000_000_01_0303morning_0015_0.jpg 0"
CAMERA = re.compile(r"\d+_\d+_(\d\d)_")
EDITIONS = (("V1", "train", "test"), ("V2", "mask_train_v2", "mask_test_v2"), ("V2", "mask_train_V2", "mask_test_V2"))
TEST_OFFSET = 10_000  # the set has 1,041 + 3,060 identities
LISTS = {"train": ("list_train.txt",), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}
TRAIN_LISTS = {"train": ("list_train.txt",), "train+val": ("list_train.txt", "list_val.txt")}
TRAIN_IMAGES = {"train": 30_248, "train+val": 32_621}


def _read(lists: dict[str, tuple[str, ...]], images: dict[str, str], folder: str, part: str) -> Reading:
    offset = 1 if part == "train" else 1 + TEST_OFFSET
    samples, names = [], {}
    for name in lists[part]:
        path = os.path.join(folder, name)
        for number, file, (identity,) in rows_of(path, 1, EXAMPLE):
            match = CAMERA.match(os.path.basename(file))
            if match is None:
                raise bad_line(path, number, f"{file} {identity}", EXAMPLE)
            samples.append(Sample(os.path.join(folder, images[part], file), identity + offset, int(match[1])))
            names[identity + offset] = str(identity)
    return Reading(samples, [], names)


def _layout(train_part: str, edition: str, train: str, test: str, lists_at: str) -> Layout:
    names = {**LISTS, "train": TRAIN_LISTS[train_part]}
    lists = {part: tuple(lists_at + name for name in names[part]) for part in names}
    images = {"train": train, "query": test, "gallery": test}
    return Layout(
        "MSMT17 V1" if edition == "V1" else "MSMT17 V2 (faces blurred)",
        "msmt17",
        FOLDERS,
        {part: (*lists[part], images[part]) for part in lists},
        partial(_read, lists, images),
        {"train": TRAIN_IMAGES[train_part], "query": 11_659, "gallery": 82_161},
        {"train": 1_041, "query": 3_060, "gallery": 3_060},
        15,
        EXAMPLE,
        train_part=train_part,
        edition=f"MSMT17_{edition}",
    )


VARIANTS = {
    variant: tuple(_layout(train_part, *edition, at) for edition in EDITIONS for at in ("", "../"))
    for variant, train_part in (("", "train"), ("train+val", "train+val"))
}

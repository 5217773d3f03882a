"""CUHK03 on disk (Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person Re-identification", CVPR 2014).

Boxes are ``detected`` or ``labeled`` by hand (easier): the first is the default, as in torchreid. Two ways to split:

* The new protocol, 767 / 700 identities (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal
  Encoding", CVPR 2017), scored like Market-1501. It lies on disk as folders, ``cuhk03-np/detected/bounding_box_train``
  with names ``0003_c1_21.png``, or as rows of ``cuhk03_new_protocol_config_detected.mat`` (1-based) into the raw set.
* ``detected-classic-0`` to ``-19``: the 20 test sets of 100 identities inside the raw set. Query and gallery are both
  all images of the 100; the protocol draws the single gallery shot.

The raw set is ``cuhk03_release/cuhk-03.mat`` (``autoreid.data.cuhk03_raw``); its images, extracted by any toolkit to
``images_detected`` and ``images_labeled``, are used where they are. The camera is the view, 1 or 2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial

from autoreid.data.cuhk03_raw import NAME, classic_sets, extracted
from autoreid.data.layout import Layout, Reading, Sample, image_names, read_named
from autoreid.data.mat_files import load_mat, variable, whole_numbers
from autoreid.errors import UserError

Read = Callable[[str, str], Reading]

FLAVOURS = ("detected", "labeled")
NP_FOLDERS = (
    "cuhk03/cuhk03-np", "CUHK03/cuhk03-np", "cuhk03-np", "CUHK03-NP", "cuhk03_np", "CUHK03_NP", "cuhk03", "CUHK03",
)  # fmt: skip
RAW_FOLDERS = ("cuhk03", "CUHK03", "cuhk-03")
NP_PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NP_PATTERN = re.compile(r"(-?\d+)_c(\d)(?!\d)")
NP_EXAMPLE = "0003_c1_21.png"
IMAGES = {
    "detected": {"train": 7_365, "query": 1_400, "gallery": 5_332},
    "labeled": {"train": 7_368, "query": 1_400, "gallery": 5_328},
}
IDENTITIES = {"train": 767, "query": 700, "gallery": 700}
CLASSIC_IDENTITIES = {"train": 1_367, "query": 100, "gallery": 100}
CLASSIC_SPLITS = 20
RELEASES = ("cuhk03_release/cuhk-03.mat", "cuhk-03.mat")


def _read_np(parts: dict[str, str], folder: str, part: str) -> Reading:
    return read_named(os.path.normpath(os.path.join(folder, parts[part])), NP_PATTERN)


def _read_new(flavour: str, images: str, config: str, folder: str, part: str) -> Reading:
    """The new protocol's rows; identities are its ``labels``, which count the people of all five pairs of cameras."""
    path = os.path.join(folder, config)
    content = load_mat(path)
    rows, labels = (whole_numbers(path, content, name).flatten() for name in (f"{part}_idx", "labels"))
    names = variable(path, content, "filelist").flatten()
    source = os.path.join(folder, images)
    directory = source if os.path.isdir(source) else extracted(source, flavour)
    samples = []
    for row in rows.tolist():
        if not 1 <= row <= min(len(names), len(labels)):
            raise UserError(f"{path} names image {row} of {len(names)}; copy it again")
        name = str(next(iter(names[row - 1].flatten()), ""))  # a cell of a cell, which may be empty
        match = NAME.match(name)
        if match is None:
            raise UserError(f"{path} names '{name}', which is not like 1_001_1_01.png; copy it again")
        samples.append(Sample(os.path.join(directory, name), int(labels[row - 1]), int(match["view"])))
    return Reading(samples, [])


def _read_classic(flavour: str, split: int, release: str, folder: str, part: str) -> Reading:
    """The people of one test set, or all others; (pair, person) of the raw set numbers them pair * 1000 + person."""
    mat = os.path.join(folder, release)
    tested = classic_sets(mat)[split]
    beside = os.path.join(folder, f"images_{flavour}")
    directory = beside if os.path.isdir(beside) else extracted(mat, flavour)
    samples, strange = [], []
    for name in image_names(directory):
        match = NAME.match(name)
        if match is None:
            strange.append(name)
        elif ((int(match["pair"]), int(match["person"])) in tested) == (part != "train"):
            identity = int(match["pair"]) * 1000 + int(match["person"])
            samples.append(Sample(os.path.join(directory, name), identity, int(match["view"])))
    return Reading(samples, strange)


def _new_protocol(flavour: str) -> tuple[Layout, ...]:
    """The folders, from the folder of both flavours or of this one; then the raw set in its arrangements."""

    def layout(folders: tuple[str, ...], needs: Mapping[str, tuple[str, ...]], read: Read, example: str) -> Layout:
        return Layout(
            f"CUHK03 {flavour}, new protocol", "cuhk03-np", folders, needs, read, IMAGES[flavour], IDENTITIES, 2, example
        )

    inside = {part: f"{flavour}/{directory}" for part, directory in NP_PARTS.items()}
    layouts = [layout(NP_FOLDERS, {part: (path,) for part, path in inside.items()}, partial(_read_np, inside), NP_EXAMPLE)]
    # --root may name the flavour's folder itself; ../detected/query is inside it only where it has that name
    alone = {part: f"../{path}" for part, path in inside.items()}
    layouts.append(layout((), {part: (path,) for part, path in alone.items()}, partial(_read_np, alone), NP_EXAMPLE))
    for images in (f"images_{flavour}", *RELEASES):
        for at in ("", "cuhk03_release/"):
            config = f"{at}cuhk03_new_protocol_config_{flavour}.mat"
            needs = dict.fromkeys(NP_PARTS, (images, config))
            layouts.append(layout(RAW_FOLDERS, needs, partial(_read_new, flavour, images, config), "1_001_1_01.png"))
    return tuple(layouts)


def _classic(flavour: str, split: int) -> tuple[Layout, ...]:
    return tuple(
        Layout(
            f"CUHK03 {flavour}, classic split {split}",
            "cuhk03-classic",
            RAW_FOLDERS,
            dict.fromkeys(NP_PARTS, (release,)),
            partial(_read_classic, flavour, split, release),
            identities=CLASSIC_IDENTITIES,
            cameras=2,
            example="1_001_1_01.png",
            one_test_list=True,
        )
        for release in RELEASES
    )


VARIANTS = {flavour: _new_protocol(flavour) for flavour in FLAVOURS} | {
    f"{flavour}-classic-{split}": _classic(flavour, split) for flavour in FLAVOURS for split in range(CLASSIC_SPLITS)
}

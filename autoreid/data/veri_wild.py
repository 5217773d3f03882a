"""VERI-Wild on disk (Lou et al., "VERI-Wild: A Large Dataset and a New Method for Vehicle Re-Identification in the
Wild", CVPR 2019).

``train_test_split/train_list.txt``, ``test_N_query.txt`` and ``test_N.txt`` (N = 3000, 5000, 10000) of lines
``00001/000001``: the vehicle, which is also the folder under ``images``, and the image. Cameras are in
``vehicle_info.txt``: a header, then lines ``00001/000001;52;2018-03-06 12:10:00;...`` of six fields.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial

from autoreid.data.layout import Layout, Reading, Sample
from autoreid.data.text import bad_line, lines_of, rows_of
from autoreid.errors import UserError

FOLDERS = ("VERI-Wild", "VERI_Wild", "VeRi-Wild", "veri-wild", "veriwild", "VeRiWild")
GALLERY = {3_000: 38_861, 5_000: 64_389, 10_000: 128_517}  # images; as many queries as identities
EXAMPLE = "00001/000001"
INFO_EXAMPLE = "00001/000001;52;2018-03-06 12:10:00;model;type;colour"
INFO = "train_test_split/vehicle_info.txt"


@lru_cache(maxsize=1)  # 416,314 lines, needed for each of three parts
def _cameras(path: str, _changed: int) -> dict[str, int]:
    """Camera of an image, by its name in the lists; ``_changed`` is the file's time, so that a new copy is read."""
    cameras = {}
    for number, line in lines_of(path):
        fields = line.split(";")
        if number == 1 and not (len(fields) > 1 and fields[1].strip().isdecimal()):
            continue  # the header
        if len(fields) < 2 or not fields[1].strip().isdecimal():
            raise bad_line(path, number, line, INFO_EXAMPLE)
        cameras[_name(fields[0])] = int(fields[1])
    return cameras


def _name(field: str) -> str:
    """Lists are passed on with and without the ending."""
    return field.strip().replace("\\", "/").removesuffix(".jpg")


def _read(size: int, folder: str, part: str) -> Reading:
    path, info = os.path.join(folder, _list(size, part)), os.path.join(folder, INFO)
    cameras = _cameras(info, os.stat(info).st_mtime_ns)
    samples, names = [], {}
    for number, line, _ in rows_of(path, 0, EXAMPLE):
        name = _name(line)
        vehicle = name.partition("/")[0]
        if not vehicle.isdecimal() or "/" not in name:
            raise bad_line(path, number, line, EXAMPLE)
        if name not in cameras:
            raise UserError(f"{path} names {name}, of which {info} does not say the camera; copy both lists again")
        samples.append(Sample(os.path.join(folder, "images", f"{name}.jpg"), int(vehicle) + 1, cameras[name]))
        names[int(vehicle) + 1] = vehicle
    return Reading(samples, [], names)


def _list(size: int, part: str) -> str:
    names = {"train": "train_list", "query": f"test_{size}_query", "gallery": f"test_{size}"}
    return f"train_test_split/{names[part]}.txt"


VARIANTS = {
    f"test-{size}": (
        Layout(
            f"VERI-Wild, test list of {size:,}",
            "veri-wild",
            FOLDERS,
            {part: (_list(size, part), INFO, "images") for part in ("train", "query", "gallery")},
            partial(_read, size),
            {"train": 277_797, "query": size, "gallery": gallery},
            {"train": 30_671, "query": size, "gallery": size},
            example=EXAMPLE,
            kind="vehicles",
        ),
    )
    for size, gallery in GALLERY.items()
}

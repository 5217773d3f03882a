"""Your own images, one folder per identity: ``DIR/<identity>/*.jpg``, or ``DIR/{train,query,gallery}/<identity>/*.jpg``.

* Identities are the folders' names, numbered from 1 in sorted order (where train has a folder of its own its names come
  first: a label of a training identity does not depend on the test). A folder ``-1`` holds junk.
* Without the three parts, identities are dealt by sorted name, every second one to the test. There the first image of an
  identity by each camera asks, as long as every query keeps a match (by another camera), and the rest answer.
* The camera is the number after ``_c`` in the file name, ``17_c3_001.jpg``, if all images of a part have one; else the
  first group of the pattern in ``DIR/autoreid.json``, ``{"camera": "cam(\\\\d+)"}``. Without cameras the protocol is plain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from autoreid.data.layout import JUNK, PARTS, Layout, Reading, Sample, image_names
from autoreid.errors import UserError, unknown
from autoreid.options import read_json

PATTERN = re.compile(r"_c(\d+)")
SETTINGS = "autoreid.json"


def _read(folder: str, part: str) -> Reading:
    if not _in_parts(folder):
        return _dealt(folder, part)
    if not os.path.isdir(os.path.join(folder, part)):
        raise UserError(
            f"dataset 'folder' at {folder}: there is no folder '{part}'; give {', '.join(PARTS)} with one folder per "
            "identity each, or one folder per identity and none of the three"
        )
    train = _people(os.path.join(folder, "train"))
    test = {name for side in ("query", "gallery") for name in _people(os.path.join(folder, side))}
    numbers = number(train) if part == "train" else number(train, test)
    directory = os.path.join(folder, part)
    people = {name: image_names(os.path.join(directory, name)) for name in _people(directory)}
    if not any(people.values()):
        raise UserError(
            f"dataset 'folder' at {folder}: folder '{part}' holds no images in a folder per identity; "
            f"move them to {part}/<identity>/"
        )
    return _samples(folder, directory, people, numbers)


def _dealt(folder: str, part: str) -> Reading:
    """The identities of one half; of the test half, who asks or who answers."""
    everybody = _people(folder)
    ordinary = [name for name in everybody if name != str(JUNK)]
    if len(ordinary) < 2:
        raise UserError(
            f"dataset 'folder' at {folder} has {len(ordinary)} folders of identities and needs at least 2: one half "
            f"trains, one tests; put each identity's images into {folder}/<identity>/"
        )
    chosen = ordinary[0::2] if part == "train" else ordinary[1::2]
    numbers = number(ordinary)
    reading = _samples(folder, folder, {name: image_names(os.path.join(folder, name)) for name in chosen}, numbers)
    if part == "train":
        kept = reading.samples
    else:
        of: dict[int, list[Sample]] = {}
        for sample in reading.samples:
            of.setdefault(sample.identity, []).append(sample)
        by_camera = len({sample.camera for sample in reading.samples}) > 1
        asking = {sample for images in of.values() for sample in _asking(images, by_camera)}
        kept = [sample for sample in reading.samples if (sample in asking) == (part == "query")]
    if part == "gallery" and len(ordinary) < len(everybody):
        kept += _samples(folder, folder, {str(JUNK): image_names(os.path.join(folder, str(JUNK)))}, numbers).samples
    if not kept:
        cure = "each needs two images, by two cameras where there are cameras" if part == "query" else "add images"
        raise UserError(
            f"dataset 'folder' at {folder} has no {part} images among its {len(chosen)} "
            f"{'training' if part == 'train' else 'test'} identities (every second folder tests): {cure}"
        )
    return Reading(kept, reading.strange)


def _asking(images: Sequence[Sample], by_camera: bool) -> list[Sample]:
    """The first image by each camera, left out where a query would have no match among those that answer."""
    asking: list[Sample] = []
    for camera in sorted({sample.camera for sample in images}):
        trial = [*asking, next(sample for sample in images if sample.camera == camera)]
        answering = {sample.camera for sample in images if sample not in trial}
        if all(answering - ({query.camera} if by_camera else set()) for query in trial):
            asking = trial
    return asking


def number(train: Iterable[str], test: Iterable[str] = ()) -> dict[str, int]:
    """Identity by name: from 1 in sorted order, those of train first; -1 stays junk."""
    first = sorted(set(train) - {str(JUNK)})
    numbers = {name: i for i, name in enumerate([*first, *sorted(set(test) - set(first) - {str(JUNK)})], start=1)}
    return {**numbers, str(JUNK): JUNK}


def _in_parts(folder: str) -> bool:
    there = [os.path.isdir(os.path.join(folder, part)) for part in PARTS]
    return there[0] or (there[1] and there[2])


def _people(directory: str) -> list[str]:
    """The folders of identities, by name; hidden ones and what an archiver left are none."""
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    return [
        name
        for name in names
        if not name.startswith((".", "__MACOSX")) and os.path.isdir(os.path.join(directory, name))
    ]


def _samples(folder: str, directory: str, people: dict[str, list[str]], numbers: dict[str, int]) -> Reading:
    pattern, declared = _camera_pattern(folder)
    files = [(name, file) for name, images in people.items() for file in images]
    matches = [pattern.search(file) for _, file in files]
    if declared and files and not any(matches):
        raise UserError(
            f"{os.path.join(folder, SETTINGS)}: the camera pattern '{pattern.pattern}' fits none of {len(files)} file "
            f"names, the first is '{files[0][1]}'; mend the pattern, or delete the file to go without cameras"
        )
    named = declared or all(matches)
    samples, strange = [], []
    for (name, file), match in zip(files, matches, strict=True):
        if named and match is None:
            strange.append(os.path.join(name, file))
        else:
            camera = _camera(folder, match, file) if named and match else 0
            samples.append(Sample(os.path.join(directory, name, file), numbers[name], camera))
    return Reading(samples, strange)


def _camera(folder: str, match: re.Match[str], file: str) -> int:
    if not (match[1] or "").isdigit():
        raise UserError(
            f"{os.path.join(folder, SETTINGS)}: in '{file}' the pattern's group is '{match[1]}', which is no camera "
            "number; put the group around the digits"
        )
    return int(match[1])


def _camera_pattern(folder: str) -> tuple[re.Pattern[str], bool]:
    """The pattern, and whether the user declared it."""
    path = os.path.join(folder, SETTINGS)
    if not os.path.exists(path):
        return PATTERN, False
    settings = read_json(path, "dataset settings")
    if not isinstance(settings, dict):
        raise UserError(f'{path} must be an object such as {{"camera": "cam(\\\\d+)"}}')
    for key in settings:
        if key != "camera":
            raise unknown(f"setting in {path}", key, ["camera"])
    try:
        pattern = re.compile(settings.get("camera", PATTERN.pattern))
    except (re.error, TypeError) as fault:
        raise UserError(f"{path}: camera is no regular expression ({fault}); such as cam(\\d+)") from None
    if pattern.groups != 1:
        raise UserError(f"{path}: the camera pattern has {pattern.groups} groups and must have one, around the number")
    return pattern, "camera" in settings


def _faults(folder: str) -> list[str]:
    """Cameras that some images have and others not, which is nearly always an oversight."""
    if _camera_pattern(folder)[1]:
        return []
    directories = [os.path.join(folder, part) for part in PARTS] if _in_parts(folder) else [folder]
    names = [file for d in directories for name in _people(d) for file in image_names(os.path.join(d, name))]
    without = [file for file in names if not PATTERN.search(file)]
    if not 0 < len(without) < len(names):
        return []
    return [
        f"{len(without)} of {len(names)} file names have no camera (_c and a number), the first is '{without[0]}': cameras "
        f"are ignored where any is missing; rename them, or give a pattern in {os.path.join(folder, SETTINGS)}"
    ]


LAYOUT = Layout(
    "images in folders",
    "",
    (),
    {},
    _read,
    example="17_c3_001.jpg",
    root="DIR, with the images in DIR/<identity>/ or in DIR/{train,query,gallery}/<identity>/",
    faults=_faults,
)

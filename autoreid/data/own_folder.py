"""Your own images, one folder per identity: ``DIR/<identity>/*.jpg``, or ``DIR/{train,query,gallery}/<identity>/*.jpg``.

* Identities are the folders' names, numbered from 1 in sorted order (where train has a folder of its own its names come
  first: a label of a training identity does not depend on the test). A folder ``-1`` holds junk.
* Without the three parts, identities are dealt by sorted name, every second one to the test. There the first image of an
  identity by each camera asks, as long as every query keeps a match (by another camera), and the rest answer.
* The camera is the number after ``_c`` in the file name, ``17_c3_001.jpg``, if all images of a part have one; else the
  first group of the pattern in ``DIR/autoreid.json``, ``{"camera": "cam(\\\\d+)"}``, a number or a name. Train's cameras
  are numbered by themselves (``layout.number_cameras``), the test's by themselves. Without cameras the protocol is plain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from autoreid.data.layout import JUNK, PARTS, Layout, Reading, Sample, image_names, moved_up, number_cameras
from autoreid.errors import UserError, unknown
from autoreid.options import read_json

PATTERN = re.compile(r"_c(\d+)")
SETTINGS = "autoreid.json"
EXAMPLE = '{"camera": "cam(\\\\d+)"}'  # as it stands in the file: JSON wants a backslash twice
LIKELY_PARTS = {  # what people call a part
    "training": "train", "trainset": "train", "bounding_box_train": "train", "probe": "query", "probes": "query",
    "queries": "query", "test": "gallery", "testing": "gallery", "bounding_box_test": "gallery",
}  # fmt: skip
UNREAD = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".ppm", ".tga")  # pictures, but not ours
SIDES = (("train",), ("query", "gallery"))

People = dict[str, list[str]]  # identity: its file names


def _read(folder: str, part: str) -> Reading:
    if not os.path.isdir(folder):
        raise UserError(f"dataset 'folder': {folder} is a file; give --root {LAYOUT.root} (for a list take dataset 'csv')")
    at = _parts(folder)
    if not at:
        return _dealt(folder, part)
    if part not in at:
        likely = [f" (rename '{name}'?)" for name in _folders(folder) if LIKELY_PARTS.get(name.lower()) == part]
        raise UserError(
            f"dataset 'folder' at {folder}: there is no folder '{part}'{''.join(likely[:1])}; "
            f"give {', '.join(PARTS)} with one folder per identity each, or one folder per identity and none of the three"
        )
    side = next(side for side in SIDES if part in side)
    train = _folders(at["train"]) if "train" in at else []
    test = {name for other in SIDES[1] if other in at for name in _folders(at[other])}
    numbers = number(train) if part == "train" else number(train, test)
    listed = {other: _people(at[other]) for other in side if other in at}
    if not any(listed[part].values()):
        own = os.path.basename(at[part])
        raise UserError(
            f"dataset 'folder' at {folder}: folder '{own}' holds no images in a folder per identity; "
            f"move them to {own}/<identity>/"
        )
    return _samples(folder, at[part], listed[part], numbers, _cameras(folder, listed.values()))


def _dealt(folder: str, part: str) -> Reading:
    """The identities of one half; of the test half, who asks or who answers."""
    everybody = _folders(folder)
    parts = {name: LIKELY_PARTS.get(name.lower(), name.lower()) for name in everybody}
    parts = {name: part for name, part in parts.items() if part in PARTS and _holds_people(os.path.join(folder, name))}
    if parts:
        raise UserError(
            f"dataset 'folder' at {folder}: these hold folders, as parts do and identities do not: {', '.join(parts)}; the "
            f"parts are {', '.join(PARTS)}: rename {', '.join(f'{name} to {part}' for name, part in parts.items())}"
        )
    ordinary = [name for name in everybody if name != str(JUNK)]
    if len(ordinary) < 2:
        raise UserError(
            f"dataset 'folder' at {folder} has {len(ordinary)} folders of identities and needs at least 2: one half "
            f"trains, one tests; put each identity's images into {folder}/<identity>/"
        )
    chosen = ordinary[0::2] if part == "train" else ordinary[1::2]
    numbers = number(ordinary)
    people = {name: image_names(os.path.join(folder, name)) for name in chosen}
    junk = {name: image_names(os.path.join(folder, name)) for name in everybody if name == str(JUNK)}
    cameras = _cameras(folder, [people] if part == "train" else [people, junk])
    reading = _samples(folder, folder, people, numbers, cameras)
    if part == "train":
        kept = reading.samples
    else:
        of: dict[int, list[Sample]] = {}
        for sample in reading.samples:
            of.setdefault(sample.identity, []).append(sample)
        by_camera = len({sample.camera for sample in reading.samples}) > 1
        asking = {sample for images in of.values() for sample in _asking(images, by_camera)}
        kept = [sample for sample in reading.samples if (sample in asking) == (part == "query")]
    if part == "gallery" and junk:
        kept += _samples(folder, folder, junk, numbers, cameras).samples
    if not kept:
        cure = "each needs two images, by two cameras where there are cameras" if part == "query" else "add images"
        raise UserError(
            f"dataset 'folder' at {folder} has no {part} images among its {len(chosen)} "
            f"{'training' if part == 'train' else 'test'} identities (every second folder tests): {cure}"
        )
    return reading._replace(samples=kept)


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


def _parts(folder: str) -> dict[str, str]:
    """The folder of each part, whatever its capitals; none where the folders are identities."""
    at: dict[str, str] = {}
    for name in sorted(_folders(folder), reverse=True):  # small letters first
        if name.lower() in PARTS:
            at.setdefault(name.lower(), os.path.join(folder, name))
    return at if "train" in at or {"query", "gallery"} <= set(at) else {}


def _folders(directory: str) -> list[str]:
    """By name; hidden ones and what an archiver left are none."""
    return sorted(
        name
        for name in os.listdir(directory)
        if not name.startswith((".", "__MACOSX")) and os.path.isdir(os.path.join(directory, name))
    )


def _people(directory: str) -> People:
    return {name: image_names(os.path.join(directory, name)) for name in _folders(directory)}


def _holds_people(directory: str) -> bool:
    """Whether it has folders and no images, as a part."""
    return not image_names(directory) and bool(_folders(directory))


def _samples(folder: str, directory: str, people: People, numbers: dict[str, int], cameras: Mapping[str, int]) -> Reading:
    pattern, declared = _camera_pattern(folder)
    files = [(name, file) for name, images in people.items() for file in images]
    matches = [pattern.search(file) for _, file in files]
    named = declared or all(matches)
    samples, strange = [], []
    for (name, file), match in zip(files, matches, strict=True):
        if named and match is None:
            strange.append(os.path.join(name, file))
        else:
            camera = cameras[match[1]] if named and match else 0
            samples.append(Sample(os.path.join(directory, name, file), numbers[name], camera))
    return Reading(samples, strange, {number: name for name, number in numbers.items()})


def _labels(folder: str, sides: Iterable[People]) -> set[str]:
    """What the file names call their cameras."""
    pattern, declared = _camera_pattern(folder)
    files = [file for people in sides for images in people.values() for file in images]
    matches = {file: pattern.search(file) for file in files}
    for file, match in matches.items():
        if match and not match[1]:
            raise UserError(
                f"{os.path.join(folder, SETTINGS)}: in '{file}' the pattern's group is empty; put it around the camera"
            )
    if declared and files and not any(matches.values()):
        raise UserError(
            f"{os.path.join(folder, SETTINGS)}: the camera pattern '{pattern.pattern}' fits none of {len(files)} file "
            f"names, the first is '{files[0]}'; mend the pattern, or delete the file to go without cameras"
        )
    return {match[1] for match in matches.values() if match}


def _cameras(folder: str, sides: Iterable[People]) -> dict[str, int]:
    return number_cameras(_labels(folder, sides))


def _camera_pattern(folder: str) -> tuple[re.Pattern[str], bool]:
    """The pattern, and whether the user declared it."""
    path = os.path.join(folder, SETTINGS)
    if not os.path.exists(path):
        return PATTERN, False
    try:
        settings = read_json(path, "dataset settings")
    except UserError as fault:
        raise UserError(f"{fault}; such as {EXAMPLE}, where every backslash is written twice") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must be an object such as {EXAMPLE}")
    for key in settings:
        if key != "camera":
            raise unknown(f"setting in {path}", key, ["camera"])
    try:
        pattern = re.compile(settings.get("camera", PATTERN.pattern))
    except (re.error, TypeError) as fault:
        raise UserError(f"{path}: camera is no regular expression ({fault}); such as {EXAMPLE}") from None
    if pattern.groups != 1:
        raise UserError(f"{path}: the camera pattern has {pattern.groups} groups and must have one, around the camera")
    return pattern, "camera" in settings


def _listed(folder: str) -> list[tuple[str, People]]:
    """Each folder that holds folders of identities, and these."""
    return [(directory, _people(directory)) for directory in _parts(folder).values() or [folder]]


def _faults(folder: str) -> list[str]:
    """Cameras that some images have and others not, and what is not read: nearly always an oversight."""
    lines, listed = [], _listed(folder)
    names = [file for _, people in listed for images in people.values() for file in images]
    without = [file for file in names if not PATTERN.search(file)]
    if 0 < len(without) < len(names) and not _camera_pattern(folder)[1]:
        lines.append(
            f"{len(without)} of {len(names)} file names have no camera (_c and a number), the first is '{without[0]}': "
            f"cameras are ignored where any is missing; rename them, or give a pattern in {os.path.join(folder, SETTINGS)}"
        )
    own = [(os.path.join(directory, name), images) for directory, people in listed for name, images in people.items()]
    inside = {at: [os.path.join(at, name) for name in _folders(at)] for at, _ in own}
    inner = {at: [one for one in inside[at] if image_names(one)] for at in inside}
    skipped = {
        ("images beside the folders of identities", "move each into its identity's folder"): [
            os.path.join(directory, name) for directory, _ in listed for name in image_names(directory)
        ],
        ("folders inside an identity's folder", "move their images up"): [one for at in inner for one in inner[at]],
        ("pictures that are no .jpg, .png, .bmp or .webp", "save them as one of these"): [
            os.path.join(at, name)
            for at, _ in own
            for name in sorted(os.listdir(at))
            if name.lower().endswith(UNREAD) and not name.startswith(".")
        ],
        ("folders of identities without any image", "fill or remove them"): [
            at for at, images in own if not images and not inner[at]
        ],
        ("folders beside the parts", f"the parts are {', '.join(PARTS)}"): [
            at for name in _folders(folder) if _parts(folder) and (at := os.path.join(folder, name)) not in dict(listed)
        ],
    }
    return lines + [
        f"not read: {what}, {len(paths)} in all, the first is {paths[0]}; {cure}"
        for (what, cure), paths in skipped.items()
        if paths
    ]


def _notes(folder: str) -> list[str]:
    at = _parts(folder)
    sides = [[_people(at[part]) for part in side if part in at] for side in SIDES] if at else [[_people(folder)]]
    return list(dict.fromkeys(line for side in sides for line in moved_up(_labels(folder, side))))


LAYOUT = Layout(
    "images in folders",
    "",
    (),
    {},
    _read,
    example="17_c3_001.jpg",
    root="DIR, with the images in DIR/<identity>/ or in DIR/{train,query,gallery}/<identity>/",
    faults=_faults,
    notes=_notes,
)

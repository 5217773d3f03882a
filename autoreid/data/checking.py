"""A dataset looked at file by file: official counts beside found ones, and a line for each fault that says the fix."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from autoreid.data.layout import DISTRACTOR, JUNK, PARTS, Layout, Reading, Sample
from autoreid.data.locate import Found, find
from autoreid.data.table import split
from autoreid.errors import UserError

Parts = dict[str, list[Sample]]


def check(name: str, root: str | os.PathLike[str] | None = None, read_images: bool = True) -> dict[str, Any]:
    """Look at every file of a dataset; ``read_images`` decodes each one (minutes on a large set).

    Returns ``dataset, title, folder, protocol, train_part, splits {part: images, identities, cameras, junk,
    distractors, unparsed}, single_image_identities, unmatched_queries, images_read, leaking [identity], missing [path],
    unreadable [path], differs [line], problems [line]``, all plain JSON. A problem is one line that ends with what to
    do; counts that differ from the official ones are none. Of joined datasets each is looked at, and a part is named
    ``market train``. Raises UserError where there is no dataset to look at.
    """
    reports = [_check(one, root, read_images) for one in split(name)]
    if len(reports) == 1:
        return reports[0]
    joined = {key: [report[key] for report in reports] for key in reports[0]}
    return {
        "dataset": "+".join(joined["dataset"]),
        "title": " + ".join(joined["title"]),
        "folder": ", ".join(joined["folder"]),
        "protocol": joined["protocol"][0],
        "train_part": ", ".join(f"{report['dataset']}: {report['train_part']}" for report in reports),
        "splits": {f"{one['dataset']} {part}": counts for one in reports for part, counts in one["splits"].items()},
        "single_image_identities": sum(joined["single_image_identities"]),
        "unmatched_queries": joined["unmatched_queries"][0],
        "images_read": read_images,
        "leaking": sum(joined["leaking"], []),
        "missing": sum(joined["missing"], []),
        "unreadable": sum(joined["unreadable"], []),
        "differs": [f"{report['dataset']} {line}" for report in reports for line in report["differs"]],
        "problems": [f"{report['dataset']} {line}" for report in reports for line in report["problems"]],
    }


def describe(report: Mapping[str, Any]) -> str:
    """A report of :func:`check` as text for a terminal."""
    names = ("images", "identities", "cameras", "junk", "distractors")
    width = max(9, *(len(part) + 1 for part in report["splits"]))
    lines = [f"{report['title']} in {report['folder']}", f"{'':{width}}" + "".join(f"{name:>13}" for name in names)]
    lines += [
        f"{part:{width}}" + "".join(f"{count[name]:>13,}" for name in names) for part, count in report["splits"].items()
    ]
    lines += [f"{line}; unpack the archive again, unless this is a subset on purpose" for line in report["differs"]]
    lines += [f"problem: {line}" for line in report["problems"]] or ["every file can be read, no problem found"]
    return "\n".join(lines)


def _check(name: str, root: str | os.PathLike[str] | None, read_images: bool) -> dict[str, Any]:
    found = find(name, root, ())
    layout = found.layout
    parts: Parts = {}
    splits: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for part in PARTS:
        reading = Reading([], [])
        try:
            reading = found.read(part)
            problems += _part_problems(found, part, reading)
        except UserError as fault:
            problems.append(str(fault))
        parts[part], splits[part] = reading.samples, _counts(reading)

    leaking = _leaking(parts)
    problems += _leak_problem(leaking) + _duplicate_problems(layout, parts)
    single = sum(count == 1 for count in Counter(s.identity for s in parts["train"] if s.identity > DISTRACTOR).values())
    if single:
        problems.append(
            f"train: {single} identities have a single image, so a triplet has no positive for them; "
            "add images of them, or leave it: the sampler repeats the image"
        )
    unmatched, lines = _match_problems(layout, parts["query"], parts["gallery"])
    problems += lines
    if layout.faults is not None and any(parts.values()):
        try:
            problems += layout.faults(found.folder)
        except UserError as fault:
            problems.append(str(fault))

    paths = list(dict.fromkeys(path for samples in parts.values() for s in samples for path in s.frames or (s.path,)))
    missing = _those(paths, lambda path: not os.path.exists(path))
    if missing:
        problems.append(f"{len(missing)} listed files are missing, the first is {missing[0]}; copy the images again")
    gone = set(missing)
    unreadable = _those([path for path in paths if path not in gone], _broken) if read_images else []
    problems += [f"unreadable or truncated image {path}: copy this file again or delete it" for path in unreadable]
    return {
        "dataset": found.name,
        "title": f"drawn, in the layout of {layout.title}" if found.drawn else layout.title,
        "folder": found.folder,
        "protocol": layout.protocol_for(parts["query"], parts["gallery"]),
        "train_part": layout.train_part,
        "splits": splits,
        "single_image_identities": single,
        "unmatched_queries": unmatched,
        "images_read": read_images,
        "leaking": leaking,
        "missing": missing,
        "unreadable": unreadable,
        "differs": [] if found.drawn else _differs(layout, parts, splits),
        "problems": problems,
    }


def _counts(reading: Reading) -> dict[str, int]:
    return {
        "images": len(reading.samples),
        "identities": len({s.identity for s in reading.samples} - {JUNK, DISTRACTOR}),
        "cameras": len(_cameras(reading.samples)),
        "junk": sum(s.identity == JUNK for s in reading.samples),
        "distractors": sum(s.identity == DISTRACTOR for s in reading.samples),
        "unparsed": len(reading.strange),
    }


def _cameras(samples: Iterable[Sample]) -> set[int]:
    """The cameras of anybody; none where all are 0. A distractor's need not be known."""
    cameras = {s.camera for s in samples if s.identity != DISTRACTOR}
    return set() if cameras == {0} else cameras


def _part_problems(found: Found, part: str, reading: Reading) -> list[str]:
    if not reading.samples:
        return [str(found.empty(part, reading))]
    problems = []
    if reading.strange:
        problems.append(
            f"{part}: {len(reading.strange)} images are not named like {found.layout.example} and are ignored, the first "
            f"is '{reading.strange[0]}'; rename or remove them"
        )
    nobody = sum(s.identity <= DISTRACTOR for s in reading.samples)
    if nobody and part == "train":
        problems.append(
            f"train: {nobody} images have identity -1 or 0000 and are left out; number identities from 0001"
        )
    if part == "query" and any(s.identity == JUNK for s in reading.samples):
        problems.append("query: images of identity -1 are left out; remove them or number their identities from 0001")
    return problems


def _leaking(parts: Parts) -> list[int]:
    tested = {s.identity for part in ("query", "gallery") for s in parts[part]}
    return sorted({s.identity for s in parts["train"] if s.identity > DISTRACTOR} & tested)


def _leak_problem(leaking: list[int]) -> list[str]:
    if not leaking:
        return []
    return [
        f"{len(leaking)} identities are in train and in the test, the first are {', '.join(map(str, leaking[:3]))}: their "
        "scores would be too good; take them out of one of the two"
    ]


def _duplicate_problems(layout: Layout, parts: Parts) -> list[str]:
    """A file listed twice counts twice; trained on, or its own answer, it makes a score too good."""
    problems = []
    for part, samples in parts.items():
        twice = [path for path, count in Counter(s.path for s in samples).items() if count > 1]
        if twice:
            problems.append(f"{part}: {len(twice)} files are listed twice, the first is {twice[0]}; list each once")
    paths = {part: {s.path for s in samples} for part, samples in parts.items()}
    for part in ("query", "gallery"):
        both = sorted(paths["train"] & paths[part])
        if both:
            problems.append(f"{part}: {len(both)} files are also in train, the first is {both[0]}; list each in one part")
    answers = sorted(paths["query"] & paths["gallery"])
    if answers and layout.protocol_for(parts["query"], parts["gallery"]) == "plain":
        problems.append(
            f"query: {len(answers)} files are also in the gallery and, without cameras, their own best match, the first is "
            f"{answers[0]}; list each in one part"
        )
    return problems


def _match_problems(layout: Layout, query: Sequence[Sample], gallery: Sequence[Sample]) -> tuple[int, list[str]]:
    """How many queries have no match that counts, and why. From a single test list the protocol draws those that have."""
    if layout.one_test_list or not query or not gallery:
        return 0, []
    by_camera = layout.protocol_for(query, gallery) != "plain"
    seen: Mapping[int, set[int]] = defaultdict(set)
    for sample in gallery:
        seen[sample.identity].add(sample.camera)
    unmatched = sum(s.identity == JUNK or not seen[s.identity] - ({s.camera} if by_camera else set()) for s in query)
    cameras = {s.camera for s in gallery if s.identity != JUNK}
    if by_camera and len(cameras) == 1 and unmatched:
        return unmatched, [
            f"every gallery image has camera {cameras.pop()}: {unmatched} of {len(query)} queries have no match by another "
            "camera and will not be scored; give the true cameras, or use --protocol plain"
        ]
    if unmatched and by_camera:
        return unmatched, [
            f"query: {unmatched} of {len(query)} queries have no gallery image of their identity from another "
            "camera and will not be scored; check the camera numbers in the names, or use --protocol plain"
        ]
    if unmatched:
        return unmatched, [
            f"query: {unmatched} of {len(query)} queries have no gallery image of their identity and will not be scored; "
            "add gallery images of them, or remove them"
        ]
    return 0, []


def _those(paths: Sequence[str], condition: Callable[[str], bool]) -> list[str]:
    """The paths for which it is so, in their order; in chunks, as MARS has 1.2 million."""

    def of_chunk(start: int) -> list[str]:
        return [path for path in paths[start : start + 256] if condition(path)]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [path for found in pool.map(of_chunk, range(0, len(paths), 256)) for path in found]


def _broken(path: str) -> bool:
    """Whether the pixels cannot all be decoded (a header alone would hide a truncated file)."""
    from PIL import Image  # here: loading a list of samples needs no imaging library

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return True
    return False


def _differs(layout: Layout, parts: Parts, splits: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for part, counts in splits.items():
        for what, unit, official in (
            ("images", layout.unit, layout.images.get(part)), ("identities", "identities", layout.identities.get(part))
        ):  # fmt: skip
            if official is not None and counts[what] != official:
                lines.append(f"{part}: {counts[what]:,} {unit} differs from the official {official:,}")
    cameras = len(_cameras(s for samples in parts.values() for s in samples))
    if layout.cameras is not None and cameras != layout.cameras:
        lines.append(f"{cameras} cameras differs from the official {layout.cameras}")
    return lines

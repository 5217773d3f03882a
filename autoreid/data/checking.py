"""A dataset looked at file by file: official counts beside found ones, and a line for each fault that says the fix."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from autoreid.data.comparing import leaking, leaks
from autoreid.data.layout import DISTRACTOR, JUNK, PARTS, Layout, Reading, Sample, Splits
from autoreid.data.locate import Found, find
from autoreid.data.table import split
from autoreid.errors import UserError

Parts = dict[str, list[Sample]]


def check(name: str, root: str | os.PathLike[str] | None = None, read_images: bool = True) -> dict[str, Any]:
    """Look at every file of a dataset; ``read_images`` decodes each one (minutes on a large set).

    Returns ``dataset, title, edition, folder, protocol, train_part, splits {part: images, identities, cameras, junk,
    distractors, unparsed}, single_image_identities, unmatched_queries, images_read, leaking [name], missing [path],
    unreadable [path], differs [line], notes [line], problems [line]``, all plain JSON. A problem is one line that ends with
    what to do; counts that differ from the official ones are none, nor is a note: how the set was understood. Of joined
    datasets each is looked at, and a part is named ``market train``. Raises UserError where there is no dataset to look at.
    """
    reports = [_check(one, root, read_images) for one in split(name)]
    if len(reports) == 1:
        return reports[0]
    joined = {key: [report[key] for report in reports] for key in reports[0]}
    return {
        "dataset": "+".join(joined["dataset"]),
        "title": " + ".join(joined["title"]),
        "edition": "+".join(edition for edition in joined["edition"] if edition),
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
        **{
            lines: [f"{report['dataset']} {line}" for report in reports for line in report[lines]]
            for lines in ("differs", "notes", "problems")
        },
    }


def describe(report: Mapping[str, Any]) -> str:
    """A report of :func:`check` as text for a terminal."""
    names = ("images", "identities", "cameras", "junk", "distractors")
    width = max(9, *(len(part) + 1 for part in report["splits"]))
    lines = [f"{report['title']} in {report['folder']}", f"{'':{width}}" + "".join(f"{name:>13}" for name in names)]
    lines += [
        f"{part:{width}}" + "".join(f"{count[name]:>13,}" for name in names) for part, count in report["splits"].items()
    ]
    without = ": the set has no cameras, so every image of an identity is a match" * (report["protocol"] == "plain")
    lines += [f"protocol {report['protocol']}{without}", *report["differs"]]
    if report["differs"]:
        lines.append("unless this is a subset on purpose, unpack the archive again")
    lines += [f"note: {line}" for line in report["notes"]]
    lines += [f"problem: {line}" for line in report["problems"]] or ["every file can be read, no problem found"]
    return "\n".join(lines)


def _check(name: str, root: str | os.PathLike[str] | None, read_images: bool) -> dict[str, Any]:
    found = find(name, root, ())
    layout = found.layout
    parts: Parts = {}
    splits: dict[str, dict[str, int]] = {}
    names: dict[int, str] = {}
    problems: list[str] = []
    lacks = {part: found.lacks(part) for part in PARTS}
    for part in PARTS:
        reading = Reading([], [])
        if fault := lacks[part]:  # said once, of all parts that want it
            problems.append(str(found.incomplete(", ".join(p for p in PARTS if lacks[p] == fault), *fault)))
        else:
            try:
                reading = found.read(part)
                problems += _part_problems(found, part, reading)
            except UserError as error:
                problems.append(str(error))
        parts[part], splits[part] = reading.samples, _counts(reading)
        names |= reading.names

    train, query, gallery = (tuple(parts[part]) for part in PARTS)
    protocol = layout.protocol_for(query, gallery)
    whole = Splits(found.name, train, gallery if layout.one_test_list else query, gallery, protocol, names=names)
    problems += leaks(whole)
    single = sum(count == 1 for count in Counter(s.identity for s in parts["train"] if s.identity > DISTRACTOR).values())
    if single:
        problems.append(
            f"train: {single} identities have a single image, so a triplet has no positive for them; "
            "add images of them, or leave it: the sampler repeats the image"
        )
    unmatched, lines = _match_problems(layout, parts["query"], parts["gallery"])
    problems += lines
    notes: list[str] = []
    for look, into in ((layout.faults, problems), (layout.notes, notes)):
        if look is not None and any(parts.values()):
            try:
                into += look(found.folder)
            except UserError as error:
                problems.append(str(error))

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
        "edition": layout.edition,
        "folder": found.folder,
        "protocol": protocol,
        "train_part": layout.train_part,
        "splits": splits,
        "single_image_identities": single,
        "unmatched_queries": unmatched,
        "images_read": read_images,
        "leaking": leaking(whole),
        "missing": missing,
        "unreadable": unreadable,
        "differs": [] if found.drawn else _differs(layout, parts, splits),
        "notes": notes,
        "problems": list(dict.fromkeys(problems)),  # a list that all parts are read from has one fault
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
    if nobody and part != "gallery":
        problems.append(
            f"{part}: {nobody} images have identity -1 or 0000 and are left out; number identities from 0001"
        )
    return problems


def _match_problems(layout: Layout, query: Sequence[Sample], gallery: Sequence[Sample]) -> tuple[int, list[str]]:
    """How many of the queries that ask (junk and distractors do not) have no match that counts, and why."""
    asking = [s for s in query if s.identity > DISTRACTOR]
    answering = [s for s in gallery if s.identity > DISTRACTOR]
    if not asking or not answering:
        return 0, []
    if layout.one_test_list and layout.cameras == 0:  # a single image is drawn into the gallery and does not ask
        if max(Counter(s.identity for s in query).values()) > 1:
            return 0, []
        return len(asking), [
            f"none of the {len(asking)} identities of the test list has a second image, so that nobody can ask and nothing "
            "can be scored; copy the list again"
        ]
    by_camera = layout.protocol_for(query, gallery) != "plain"
    seen: dict[int, set[int]] = {}
    for sample in answering:
        seen.setdefault(sample.identity, set()).add(sample.camera)
    lost = [s for s in asking if not seen.get(s.identity, set()) - ({s.camera} if by_camera else set())]
    if not lost:
        return 0, []
    cameras = {s.camera for s in answering}
    if by_camera and len(cameras) == 1 and any(s.identity in seen for s in lost):
        line = (
            f"every gallery image has camera {cameras.pop()}: {len(lost)} of {len(asking)} queries have no match by "
            "another camera and will not be scored; give the true cameras, or use --protocol plain"
        )
    elif by_camera:
        line = (
            f"query: {len(lost)} of {len(asking)} queries have no gallery image of their identity from another "
            "camera and will not be scored; check the camera numbers in the names, or use --protocol plain"
        )
    else:
        line = (
            f"query: {len(lost)} of {len(asking)} queries have no gallery image of their identity and will not be scored; "
            "add gallery images of them, or remove them"
        )
    return len(lost), [line]


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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # as pictures.UNREADABLE
        return True
    return False


def _differs(layout: Layout, parts: Parts, splits: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for part, counts in splits.items():
        for what, unit, official in (
            ("images", layout.unit, layout.images.get(part)), ("identities", "identities", layout.identities.get(part))
        ):  # fmt: skip
            if official is not None and counts[what] != official:
                lines.append(f"{part}: {counts[what]:,} {unit}, officially {official:,}")
    cameras = len(_cameras(s for samples in parts.values() for s in samples))
    if layout.cameras is not None and cameras != layout.cameras:
        lines.append(f"{cameras} cameras, officially {layout.cameras}")
    return lines

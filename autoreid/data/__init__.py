"""Datasets as lists of samples: which file shows whom, and from which camera. No torch, no pixels.

``load`` opens only the folders of the parts it is asked for: a search asks for ``("train",)`` and cannot see query or
gallery, whether they exist or not. Files are sorted by name, so labels, splits and batches are the same on every
machine (the order of a directory listing is not). ``check`` looks at everything and says what to mend.

Adding a dataset: a module of facts beside ``market.py`` and a line in ``DATASETS``.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from autoreid.data import market, veri
from autoreid.errors import UserError, unknown

JUNK = -1  # a bad detection: left out of every part
DISTRACTOR = 0  # ranked in the gallery, matches nothing, never trained on
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


class Sample(NamedTuple):
    """One image file: its absolute path, who is in it, and which camera took it."""

    path: str
    identity: int
    camera: int


@dataclass(frozen=True)
class Splits:
    """The parts of a dataset that were asked for (the others are empty); ``junk`` gallery files were left out."""

    name: str
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    protocol: str
    junk: int = 0


class Layout(Protocol):
    """What a module of facts such as ``autoreid.data.market`` says."""

    TITLE: str
    PROTOCOL: str
    FOLDERS: tuple[str, ...]
    PARTS: dict[str, str]
    PATTERN: re.Pattern[str]
    EXAMPLE: str
    IMAGES: dict[str, int]
    IDENTITIES: dict[str, int]


@dataclass(frozen=True)
class Dataset:
    """A name's layout; ``drawn`` is (kind, size) where the images are drawn by ``autoreid.data.drawn``."""

    layout: Layout
    drawn: tuple[str, str] | None = None


DATASETS: dict[str, Dataset] = {
    "market": Dataset(market),
    "veri": Dataset(veri),
    "drawn-people": Dataset(market, drawn=("people", "small")),
    "drawn-people-tiny": Dataset(market, drawn=("people", "tiny")),
    "drawn-people-market": Dataset(market, drawn=("people", "market")),
    "drawn-vehicles": Dataset(veri, drawn=("vehicles", "small")),
    "drawn-vehicles-tiny": Dataset(veri, drawn=("vehicles", "tiny")),
    "drawn-vehicles-market": Dataset(veri, drawn=("vehicles", "market")),
}


def load(
    name: str, root: str | os.PathLike[str] | None = None, parts: Sequence[str] = ("train", "query", "gallery")
) -> Splits:
    """The samples of the named parts, sorted by file name; no other part's folder is opened or listed.

    ``root`` is the folder that holds the dataset's folder, or the dataset's folder itself; a drawn dataset needs none
    and is drawn on first use. Identity -1 is left out everywhere, identity 0000 also from train (it is nobody).
    Raises UserError: unknown name or part, no root, no such folder, a part missing or empty, names that do not parse.
    """
    dataset, folder = _locate(name, root, parts)
    found: dict[str, tuple[Sample, ...]] = {"train": (), "query": (), "gallery": ()}
    junk = 0
    for part in parts:
        samples, strange = _read(dataset.layout, folder, part)
        if not samples:
            raise _nothing_read(name, dataset.layout, folder, part, strange)
        left_out = {JUNK, DISTRACTOR} if part == "train" else {JUNK}
        found[part] = tuple(s for s in samples if s.identity not in left_out)
        if part == "gallery":
            junk = len(samples) - len(found[part])
    return Splits(name, **found, protocol=dataset.layout.PROTOCOL, junk=junk)


def check(name: str, root: str | os.PathLike[str] | None = None, read_images: bool = True) -> dict:
    """Look at every file of a dataset; ``read_images`` decodes each one (minutes on a large set).

    Returns ``dataset, title, folder, protocol, splits {part: images, identities, cameras, junk, distractors,
    unparsed}, single_image_identities, unmatched_queries, unreadable [path], differs [line], problems [line]``, all
    plain JSON. A problem is one line that ends with what to do; counts that differ from the official ones are none.
    Raises UserError where there is no dataset to look at.
    """
    dataset, folder = _locate(name, root, ())
    layout = dataset.layout
    found: dict[str, list[Sample]] = {}
    splits: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for part in layout.PARTS:
        samples, strange = _read(layout, folder, part)
        found[part], splits[part] = samples, _counts(samples, strange)
        problems += _part_problems(name, layout, folder, part, samples, strange)

    images_of = Counter(s.identity for s in found["train"] if s.identity > DISTRACTOR)
    single = sum(count == 1 for count in images_of.values())
    if single:
        problems.append(
            f"train: {single} identities have a single image, so a triplet has no positive for them; "
            "add images of them, or leave it: the sampler repeats the image"
        )
    unmatched = _unmatched(found["query"], found["gallery"])
    if unmatched:
        problems.append(
            f"query: {unmatched} of {len(found['query'])} queries have no gallery image of their identity from another "
            "camera and will not be scored; check the camera numbers in the names, or use --protocol plain"
        )
    unreadable = _unreadable([s.path for part in found.values() for s in part]) if read_images else []
    problems += [f"unreadable or truncated image {path}: copy this file again or delete it" for path in unreadable]
    differs = [] if dataset.drawn else _differs(layout, splits)
    return {
        "dataset": name,
        "title": layout.TITLE if dataset.drawn is None else f"drawn, in the layout of {layout.TITLE}",
        "folder": folder,
        "protocol": layout.PROTOCOL,
        "splits": splits,
        "single_image_identities": single,
        "unmatched_queries": unmatched,
        "images_read": read_images,
        "unreadable": unreadable,
        "differs": differs,
        "problems": problems,
    }


def describe(report: Mapping) -> str:
    """A report of :func:`check` as text for a terminal."""
    names = ("images", "identities", "cameras", "junk", "distractors")
    lines = [f"{report['title']} in {report['folder']}", f"{'':9}" + "".join(f"{name:>13}" for name in names)]
    lines += [f"{part:9}" + "".join(f"{count[name]:>13,}" for name in names) for part, count in report["splits"].items()]
    lines += [f"{line}; unpack the archive again, unless this is a subset on purpose" for line in report["differs"]]
    lines += [f"problem: {line}" for line in report["problems"]] or ["every file can be read, no problem found"]
    return "\n".join(lines)


def _locate(name: str, root: str | os.PathLike[str] | None, parts: Sequence[str]) -> tuple[Dataset, str]:
    """The dataset's entry in the table and its folder (absolute), by asking only whether folders exist."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset = DATASETS[name]
    layout = dataset.layout
    for part in parts:
        if part not in layout.PARTS:
            raise unknown("part", part, layout.PARTS)
    if dataset.drawn is not None:
        from autoreid.data import drawn  # here, so that real datasets need no drawing code

        kind, size = dataset.drawn
        where = None if root is None else os.path.expanduser(root)
        return dataset, os.path.abspath(drawn.ensure(kind, size, root=where))
    if root is None:
        raise UserError(
            f"dataset '{name}' needs --root DIR: the folder that holds {_usual(layout)}, or that folder itself; "
            f"to try without files use --dataset {_stand_in(layout)}"
        )
    base = os.path.abspath(os.path.expanduser(root))  # neither Python nor --root=~/data expands it
    candidates = [os.path.join(base, *folder.split("/")) for folder in layout.FOLDERS] + [base]
    wanted = [layout.PARTS[part] for part in parts] or list(layout.PARTS.values())
    # The folder with most of what is wanted; where none has any, one with another part, for a better message.
    for names in (wanted, list(layout.PARTS.values())):
        best = max(candidates, key=lambda folder: sum(os.path.isdir(os.path.join(folder, n)) for n in names))
        if any(os.path.isdir(os.path.join(best, n)) for n in names):
            return dataset, best
    raise UserError(
        f"dataset '{name}' is not under {base}{'' if os.path.isdir(base) else ' (no such folder)'}: looked there and "
        f"in its {', '.join(layout.FOLDERS)} for the folders {', '.join(layout.PARTS.values())}; "
        f"give --root the folder that holds {_usual(layout)}, or that folder itself"
    )


def _usual(layout: Layout) -> str:
    """The dataset's own folder name: the first that is not inside another."""
    return next(folder for folder in layout.FOLDERS if "/" not in folder)


def _stand_in(layout: Layout) -> str:
    alike = (name for name, dataset in DATASETS.items() if dataset.drawn and dataset.layout is layout)
    return next(alike, "drawn-people")


def _read(layout: Layout, folder: str, part: str) -> tuple[list[Sample], list[str]]:
    """One part's samples by file name, and the names of images that do not fit the pattern; both empty if no folder.

    Thumbs.db, .DS_Store, __MACOSX and the like are no images, and hidden names (._0002_c1...) are not looked at.
    """
    directory = os.path.join(folder, layout.PARTS[part])
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    samples, strange = [], []
    for file in names:
        if file.startswith(".") or not file.lower().endswith(IMAGE_ENDINGS):
            continue
        match = layout.PATTERN.match(file)
        if match is None:
            strange.append(file)
        else:
            samples.append(Sample(os.path.join(directory, file), int(match[1]), int(match[2])))
    return samples, strange


def _nothing_read(name: str, layout: Layout, folder: str, part: str, strange: list[str]) -> UserError:
    """Why a part has no samples: its folder is missing, or has no images, or none of the names can be parsed."""
    directory = layout.PARTS[part]
    if strange:
        return UserError(
            f"dataset '{name}' at {folder}: none of the {len(strange)} images in '{directory}' is named like "
            f"{layout.EXAMPLE} (identity, camera), the first is '{strange[0]}'; rename them or choose another --dataset"
        )
    fault = "holds no images" if os.path.isdir(os.path.join(folder, directory)) else "is missing"
    return UserError(
        f"dataset '{name}' at {folder} is incomplete: folder '{directory}' ({part}) {fault}; "
        f"copy the whole dataset again ({', '.join(layout.PARTS.values())})"
    )


def _counts(samples: list[Sample], strange: list[str]) -> dict[str, int]:
    return {
        "images": len(samples),
        "identities": len({s.identity for s in samples} - {JUNK, DISTRACTOR}),
        "cameras": len({s.camera for s in samples}),
        "junk": sum(s.identity == JUNK for s in samples),
        "distractors": sum(s.identity == DISTRACTOR for s in samples),
        "unparsed": len(strange),
    }


def _part_problems(
    name: str, layout: Layout, folder: str, part: str, samples: list[Sample], strange: list[str]
) -> list[str]:
    if not samples:
        return [str(_nothing_read(name, layout, folder, part, strange))]
    problems = []
    if strange:
        problems.append(
            f"{part}: {len(strange)} images are not named like {layout.EXAMPLE} and are ignored, the first is "
            f"'{strange[0]}'; rename or remove them"
        )
    nobody = sum(s.identity <= DISTRACTOR for s in samples)
    if nobody and part == "train":
        problems.append(
            f"train: {nobody} images have identity -1 or 0000 and are left out; number identities from 0001"
        )
    if part == "query" and any(s.identity == JUNK for s in samples):
        problems.append("query: images of identity -1 are left out; remove them or number their identities from 0001")
    return problems


def _unmatched(query: Sequence[Sample], gallery: Sequence[Sample]) -> int:
    """How many queries have no gallery image of the same identity taken by another camera."""
    cameras: Mapping[int, set[int]] = defaultdict(set)
    for sample in gallery:
        cameras[sample.identity].add(sample.camera)
    return sum(s.identity == JUNK or not cameras[s.identity] - {s.camera} for s in query)


def _unreadable(paths: list[str]) -> list[str]:
    """The paths whose pixels cannot all be decoded (a header alone would hide a truncated file)."""
    from PIL import Image  # here: loading a list of samples needs no imaging library

    def broken(path: str) -> bool:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError):
            return True
        return False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [path for path, bad in zip(paths, pool.map(broken, paths, chunksize=64), strict=True) if bad]


def _differs(layout: Layout, splits: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for part, counts in splits.items():
        for what, official in (("images", layout.IMAGES.get(part)), ("identities", layout.IDENTITIES.get(part))):
            if official is not None and counts[what] != official:
                lines.append(f"{part}: {counts[what]:,} {what} differs from the official {official:,}")
    return lines

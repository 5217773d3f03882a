"""What a dataset is to autoreid: samples, and the layout in which they lie on disk. No torch, no pixels.

A module of this package either states the facts of a set whose file names say everything (``market.py``), or builds a
:class:`Layout` around a function that reads one part from the set's lists (``vehicleid.py``). Whatever the source, an
identity of -1 is junk and 0 a distractor: so a list that counts its identities from 0 is read as from 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

JUNK = -1  # a bad detection: left out of every part
DISTRACTOR = 0  # ranked in the gallery, matches nothing, never trained on
PARTS = ("train", "query", "gallery")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Sample(NamedTuple):
    """One image file: its absolute path, who is in it, and which camera took it (0 where the set has no cameras: a user's
    cameras are counted from 1, see :func:`number_cameras`).

    A tracklet is one sample: ``frames`` are the paths of all its images, ``path`` the first of them.
    """

    path: str
    identity: int
    camera: int
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """The parts of a dataset that were asked for (the others are empty); ``junk`` gallery files were left out.

    ``train_part`` names the lists that were trained on ("train", "train+val"): rows of a table that differ in it are
    not comparable. So are those that differ in the ``edition`` ("MSMT17_V2"; "" where a set has one only); ``title`` says
    it to people. ``names``: what the user calls an identity, where it is not the number. Where a protocol draws its gallery
    from one list of test images (VehicleID), ``query`` and ``gallery`` are both that list, the same object.
    """

    name: str
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    protocol: str
    junk: int = 0
    train_part: str = "train"
    title: str = ""
    edition: str = ""
    names: Mapping[int, str] = field(default_factory=dict)

    def name_of(self, identity: int) -> str:
        """What the list, folder or file name calls an identity."""
        return self.names.get(identity, str(identity))


class Reading(NamedTuple):
    """One part as it lies on disk, junk and distractors included; ``strange`` images have a name that says nothing.

    ``names``: see :class:`Splits`.
    """

    samples: list[Sample]
    strange: list[str]
    names: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Layout:
    """One way a dataset lies on disk, and what its authors say of it."""

    title: str
    protocol: str  # "": by the images, market1501 where they have cameras and plain where not
    folders: tuple[str, ...]  # under --root, the longest way down first; (): what --root names
    needs: Mapping[str, tuple[str, ...]]  # part: the paths inside the folder without which it cannot be read
    read: Callable[[str, str], Reading]  # (folder, part), called once all the part needs is there
    images: Mapping[str, int] = field(default_factory=dict)  # official counts, junk and distractors included
    identities: Mapping[str, int] = field(default_factory=dict)  # without junk and distractors
    cameras: int | None = None  # of all parts together
    example: str = ""  # a name or a line as the set writes it
    kind: str = "people"  # or vehicles: which drawn set can stand in
    unit: str = "images"
    train_part: str = "train"
    one_test_list: bool = False  # query and gallery are the same list, the protocol draws from it
    root: str = ""  # what --root names, where it is not a folder that holds one of ``folders``
    notice: str = ""  # said once, before the set is read
    faults: Callable[[str], list[str]] | None = None  # (folder): what only this set can get wrong, a line each
    notes: Callable[[str], list[str]] | None = None  # (folder): how it was understood, where that is worth a line
    edition: str = ""  # its name, where the set was published in several

    def protocol_for(self, query: Sequence[Sample], gallery: Sequence[Sample]) -> str:
        """The set's protocol; of an own set market1501 where query and gallery have cameras, else plain."""
        seen = all(any(sample.camera for sample in side) for side in (query, gallery) if side)
        return self.protocol or ("market1501" if seen else "plain")

    def needed(self) -> list[str]:
        """All needed paths, each once, in the order of the parts."""
        return list(dict.fromkeys(path for paths in self.needs.values() for path in paths))


class Facts(Protocol):
    """What a module such as ``autoreid.data.market`` says: a folder per part, and all else in the file names.

    It may also have CAMERAS, KIND, NOTICE and ``faults``: see the fields of :class:`Layout`.
    """

    TITLE: str
    PROTOCOL: str
    FOLDERS: tuple[str, ...]
    PARTS: dict[str, str]
    PATTERN: re.Pattern[str]
    EXAMPLE: str
    IMAGES: dict[str, int]
    IDENTITIES: dict[str, int]


def of_facts(facts: Facts) -> Layout:
    """The layout of a module of facts."""
    return Layout(
        facts.TITLE,
        facts.PROTOCOL,
        facts.FOLDERS,
        {part: (folder,) for part, folder in facts.PARTS.items()},
        partial(_read_part, facts),
        facts.IMAGES,
        facts.IDENTITIES,
        getattr(facts, "CAMERAS", None),
        facts.EXAMPLE,
        getattr(facts, "KIND", "people"),
        notice=getattr(facts, "NOTICE", ""),
        faults=getattr(facts, "faults", None),
    )


def _read_part(facts: Facts, folder: str, part: str) -> Reading:
    return read_named(os.path.join(folder, facts.PARTS[part]), facts.PATTERN)


def read_named(directory: str, pattern: re.Pattern[str]) -> Reading:
    """A folder of images named by identity and camera (the pattern's two groups), by file name."""
    samples, strange = [], []
    for file in image_names(directory):
        match = pattern.match(file)
        if match is None:
            strange.append(file)
        else:
            samples.append(Sample(os.path.join(directory, file), int(match[1]), int(match[2])))
    return Reading(samples, strange)


def image_names(directory: str) -> list[str]:
    """The images of a folder, sorted: the order of a directory listing differs from machine to machine.

    Thumbs.db, .DS_Store, __MACOSX and the like are no images, and hidden names (._0002_c1...) are not looked at.
    """
    return sorted(
        name for name in os.listdir(directory) if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
    )


def number_cameras(labels: Iterable[str]) -> dict[str, int]:
    """Camera by what a user calls it: a number stays, but where a 0 is among them all move up by one, as 0 is no camera;
    names (and what is no number for a computer) count from 1 in sorted order."""
    distinct = sorted(set(labels))
    if all(label.isdecimal() and len(label) < 19 for label in distinct):  # 19 digits may be beyond 64 bits
        up = any(int(label) == 0 for label in distinct)
        return {label: int(label) + up for label in distinct}
    return {label: number for number, label in enumerate(distinct, start=1)}


def moved_up(labels: Iterable[str]) -> list[str]:
    """The line that says so, where :func:`number_cameras` moves them."""
    numbers = number_cameras(labels)
    if not numbers or any(not label.isdecimal() or camera != int(label) + 1 for label, camera in numbers.items()):
        return []
    return ["cameras count from 0 and are all moved up by one, as 0 stands for no camera: camera 0 is 1 here"]

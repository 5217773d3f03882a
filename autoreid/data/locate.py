"""Where on disk a dataset lies: found by asking only whether paths exist, nothing is opened or listed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from autoreid.data.layout import PARTS, Layout, Reading
from autoreid.data.table import resolve
from autoreid.errors import UserError, unknown
from autoreid.runs import say

_SAID: set[str] = set()


@dataclass(frozen=True)
class Found:
    """A dataset by its full name, in the layout and the folder (absolute) where it was found."""

    name: str
    layout: Layout
    folder: str
    drawn: bool

    def read(self, part: str) -> Reading:
        """One part; raises UserError where its lists or folders are missing or damaged."""
        if lacks := self.lacks(part):
            raise self.incomplete(part, *lacks)
        reading = self.layout.read(self.folder, part)
        for sample in reading.samples:
            if max(abs(sample.identity), abs(sample.camera)) >= 2**63:
                raise UserError(
                    f"dataset '{self.name}' at {self.folder}: {sample.path} ({part}) has identity {sample.identity} and "
                    f"camera {sample.camera}, and numbers must be below 2^63; renumber them"
                )
        return reading

    def lacks(self, part: str) -> tuple[str, str] | None:
        """The first path without which the part cannot be read, and what is wrong with it."""
        for path in self.layout.needs.get(part, ()):
            whole, kind = os.path.join(self.folder, path), _kind(path)
            if not os.path.exists(whole):
                return path, "is missing"
            if os.path.isdir(whole) != (kind == "folder"):
                return path, f"is no {kind}"
        return None

    def empty(self, part: str, reading: Reading) -> UserError:
        """Why a part that could be read has no samples."""
        path = self.layout.needs[part][0]
        if reading.strange:
            return UserError(
                f"dataset '{self.name}' at {self.folder}: none of the {len(reading.strange)} images in '{path}' is named "
                f"like {self.layout.example} (identity, camera), the first is '{reading.strange[0]}'; "
                "rename them or choose another --dataset"
            )
        return self.incomplete(part, path, "names no images" if _kind(path) == "file" else "holds no images")

    def incomplete(self, parts: str, path: str, fault: str) -> UserError:
        return UserError(
            f"dataset '{self.name}' at {self.folder} is incomplete: {_kind(path)} '{path}' ({parts}) {fault}; "
            f"copy the whole dataset again ({', '.join(self.layout.needed())})"
        )


def find(name: str, root: str | os.PathLike[str] | None, parts: Sequence[str]) -> Found:
    """The layout and folder that hold most of what these parts need; a drawn set is drawn where it is not yet."""
    full, dataset, layouts = resolve(name)
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if dataset.drawn is not None:
        from autoreid.data import drawn  # here, so that real datasets need no drawing code

        kind, size = dataset.drawn
        where = None if root is None else os.path.expanduser(root)
        return Found(full, layouts[0], os.path.abspath(drawn.ensure(kind, size, root=where)), True)
    if root is None:
        raise UserError(
            f"dataset '{full}' needs --root DIR: {_what_root_is(layouts)}; "
            f"to try without files use --dataset drawn-{layouts[0].kind}"
        )
    base = os.path.abspath(os.path.expanduser(root))  # neither Python nor --root=~/data expands it
    found = _best(layouts, base, parts) or _best(layouts, base, PARTS)  # the second for a better message
    if found is None:
        raise _nowhere(full, layouts, base)
    layout, folder = found
    if layout.notice and layout.notice not in _SAID:
        _SAID.add(layout.notice)
        say(layout.notice)
    return Found(full, layout, folder, False)


def _best(layouts: Sequence[Layout], base: str, parts: Sequence[str]) -> tuple[Layout, str] | None:
    """Where the largest share of the needed paths exists; where shares are equal in the folder that is called like the
    edition, and else in the earlier candidate. Raises UserError where two editions are whole: which is meant?"""
    best, most = None, (0.0, True)
    editions: dict[str, str] = {}
    for layout in layouts:
        wanted = [path for part in parts or PARTS for path in layout.needs.get(part, ())]
        for folder in _places(layout, base):
            there = [os.path.exists(os.path.join(folder, path)) for path in wanted] or [os.path.exists(folder)]
            found = sum(there) / len(there), layout.edition.lower() in os.path.basename(folder).lower()
            if found > most:
                best, most = (layout, folder), found
            if layout.edition and all(there):
                editions.setdefault(layout.edition, folder)
    if len(editions) > 1:
        both = ", ".join(f"{edition} in {folder}" for edition, folder in editions.items())
        choice = " or ".join(f"--root {folder}" for folder in dict.fromkeys(editions.values()))
        raise UserError(
            f"two editions with other pictures are under {base}: {both}; "
            + (f"give {choice}, or " if len(set(editions.values())) > 1 else "")
            + "move one of them elsewhere"
        )
    return best


def _places(layout: Layout, base: str) -> list[str]:
    """Where it may lie: an archive's folder is often unpacked into a folder of its own name."""
    places = []
    for name in layout.folders:
        *above, own = name.split("/")
        places += [os.path.join(base, *above, own, own), os.path.join(base, *above, own)]
    return [*places, base]


def _nowhere(name: str, layouts: Sequence[Layout], base: str) -> UserError:
    if not layouts[0].folders:
        return UserError(f"dataset '{name}': there is no {base}; give --root {_what_root_is(layouts)}")
    gone = "" if os.path.exists(base) else " (no such folder)"
    folders = list(dict.fromkeys(folder for layout in layouts for folder in layout.folders))
    # Arrangements that share a path with one already named are not worth a longer line.
    ways: list[list[str]] = []
    for layout in layouts:
        if not any(path in way for way in ways for path in layout.needed()) and layout.folders:
            ways.append(layout.needed())
    wanted = " or ".join(f"{'' if 'file' in map(_kind, way) else 'the folders '}{', '.join(way)}" for way in ways)
    return UserError(
        f"dataset '{name}' is not under {base}{gone}: looked there and in its {', '.join(folders)} for {wanted}; "
        f"give --root {_what_root_is(layouts)}"
    )


def _what_root_is(layouts: Sequence[Layout]) -> str:
    """The dataset's own folder name is the first that is not inside another."""
    if not layouts[0].folders:
        return layouts[0].root
    return f"the folder that holds {next(f for f in layouts[0].folders if '/' not in f)}, or that folder itself"


def _kind(path: str) -> str:
    return "file" if os.path.splitext(path)[1] else "folder"



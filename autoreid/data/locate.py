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
        for path in self.layout.needs.get(part, ()):
            if not os.path.exists(os.path.join(self.folder, path)):
                raise self._incomplete(part, path, "is missing")
        return self.layout.read(self.folder, part)

    def empty(self, part: str, reading: Reading) -> UserError:
        """Why a part that could be read has no samples."""
        path = self.layout.needs[part][0]
        if reading.strange:
            return UserError(
                f"dataset '{self.name}' at {self.folder}: none of the {len(reading.strange)} images in '{path}' is named "
                f"like {self.layout.example} (identity, camera), the first is '{reading.strange[0]}'; "
                "rename them or choose another --dataset"
            )
        return self._incomplete(part, path, "names no images" if _is_file(path) else "holds no images")

    def _incomplete(self, part: str, path: str, fault: str) -> UserError:
        kind = "file" if _is_file(path) else "folder"
        return UserError(
            f"dataset '{self.name}' at {self.folder} is incomplete: {kind} '{path}' ({part}) {fault}; "
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
    """Where the largest share of the needed paths exists, the earlier candidate where shares are equal."""
    best, most = None, 0.0
    for layout in layouts:
        wanted = [path for part in parts or PARTS for path in layout.needs.get(part, ())]
        for folder in [os.path.join(base, *name.split("/")) for name in layout.folders] + [base]:
            there = [os.path.exists(os.path.join(folder, path)) for path in wanted] or [os.path.exists(folder)]
            if sum(there) / len(there) > most:
                best, most = (layout, folder), sum(there) / len(there)
    return best


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
    wanted = " or ".join(f"{'' if any(map(_is_file, way)) else 'the folders '}{', '.join(way)}" for way in ways)
    return UserError(
        f"dataset '{name}' is not under {base}{gone}: looked there and in its {', '.join(folders)} for {wanted}; "
        f"give --root {_what_root_is(layouts)}"
    )


def _what_root_is(layouts: Sequence[Layout]) -> str:
    """The dataset's own folder name is the first that is not inside another."""
    if not layouts[0].folders:
        return layouts[0].root
    return f"the folder that holds {next(f for f in layouts[0].folders if '/' not in f)}, or that folder itself"


def _is_file(path: str) -> bool:
    return bool(os.path.splitext(path)[1])



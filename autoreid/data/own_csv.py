"""Your own images, listed in a .csv file: columns ``path``, ``identity``, ``split`` and, if there are any, ``camera``.

Paths are relative to the file. ``split`` is train, query or gallery. Identities are names, numbered like those of
``own_folder.py``: a 0 is somebody; -1 is junk. Cameras are numbers or names (``layout.number_cameras``); without the
column, or with nothing in it, the protocol is plain. Excel's semicolons, tabs, ``sep=`` line, UTF-16 and byte order mark
are understood. Other columns are not read; one that is nearly called ``camera`` is refused where there is none.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence

from autoreid.data.layout import PARTS, Layout, Reading, Sample, moved_up, number_cameras
from autoreid.data.own_folder import LIKELY_PARTS, number
from autoreid.data.text import text_of
from autoreid.errors import UserError, unknown

COLUMNS = ("path", "identity", "camera", "split")
LIKELY = {  # what people call a column whose name is nothing like ours
    "path": ("file", "filename", "image", "img"), "identity": ("id", "pid", "person", "vehicle", "label"),
    "camera": ("cam", "camid", "cam_id"), "split": ("part", "set", "subset", "fold"),
}  # fmt: skip


def _read(root: str, part: str) -> Reading:
    path = _csv_file(root)
    rows, _ = _rows(path)
    numbers = number(*({row["identity"] for row in rows if (row["split"] == "train") == train} for train in (True, False)))
    cameras = _cameras(path, rows)
    folder = os.path.dirname(path)
    samples = [
        Sample(os.path.normpath(os.path.join(folder, row["path"])), numbers[row["identity"]], camera)
        for row, camera in zip(rows, cameras, strict=True)
        if row["split"] == part
    ]
    if not samples:
        raise UserError(f"{path} has no row with split {part}; mark the images of that part")
    return Reading(samples, [], {identity: name for name, identity in numbers.items()})


def _csv_file(root: str) -> str:
    if os.path.isfile(root):
        return root
    found = sorted(name for name in os.listdir(root) if name.lower().endswith(".csv") and not name.startswith("."))
    if len(found) != 1:
        listed = f" ({', '.join(found[:5])})" if found else ""
        raise UserError(f"dataset 'csv': {root} holds {len(found)} .csv files{listed}; give --root the file itself")
    return os.path.join(root, found[0])


def _rows(path: str) -> tuple[list[dict[str, str]], list[str]]:
    """The rows, each with all COLUMNS (an absent camera is empty), and the columns that are not read."""
    text, above = text_of(path), 0
    first, _, rest = text.partition("\n")
    declared = re.fullmatch(r"\"?sep=(.)\"?\s*", first, re.IGNORECASE)  # Excel's own line
    if declared:
        text, above = rest, 1
    header = text.partition("\n")[0]
    lines = _values(path, text, declared[1] if declared else max(",;\t", key=header.count), above)
    names = [name.strip().lower() for name in next(lines, (0, []))[1]]
    others = [name for name in names if name not in COLUMNS]
    for column in COLUMNS:
        if column in names:
            continue
        meant = next((name for name in others if name in LIKELY[column]), None)
        meant = meant or next(iter(difflib.get_close_matches(column, others, 1, 0.7)), None)
        if column != "camera":
            raise UserError(
                f"{path} has no column '{column}'{f' (is it {meant!r}?)' if meant else ''}, its first line is '{header}'; "
                "the first line must name path, identity, split and, if known, camera"
            )
        if meant:
            raise UserError(
                f"{path} has no column 'camera' but one that is called '{meant}'; call it 'camera', or remove it to go "
                "without cameras"
            )
    rows = []
    for line, values in lines:
        row = dict.fromkeys(COLUMNS, "") | {name: value.strip() for name, value in zip(names, values)}
        for column in ("path", "identity", "split"):
            if not row[column]:
                raise UserError(f"{path} line {line}: {column} is empty; fill it in or delete the line")
        row["split"], row["path"] = row["split"].lower(), row["path"].replace("\\", "/")
        if row["split"] in LIKELY_PARTS:
            meant = LIKELY_PARTS[row["split"]]
            raise UserError(
                f"unknown split in {path} line {line}: '{row['split']}'; did you mean '{meant}'? known: {', '.join(PARTS)}"
            )
        if row["split"] not in PARTS:
            raise unknown(f"split in {path} line {line}:", row["split"], PARTS)
        row["line"] = str(line)
        rows.append(row)
    return rows, [name for name in others if name]


def _values(path: str, text: str, delimiter: str, above: int) -> Iterator[tuple[int, Sequence[str]]]:
    """The lines that hold something, each with its number in the file, ``above`` of whose lines are not in ``text``."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        begin = above + reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            raise UserError(
                f"{path} line {begin}: a quote opens that does not close where the value ends ({fault}); close or remove it"
            ) from None
        if any(value.strip() for value in values):
            yield above + reader.line_num, values


def _cameras(path: str, rows: list[dict[str, str]]) -> list[int]:
    """A number per row; all 0 where no row has a camera."""
    given = {row["camera"] for row in rows}
    if given <= {""}:
        return [0] * len(rows)
    if "" in given:
        line = next(row["line"] for row in rows if not row["camera"])
        raise UserError(f"{path} line {line}: camera is empty, but other rows have one; fill it in, or empty the column")
    numbers = number_cameras(given)
    return [numbers[row["camera"]] for row in rows]


def _notes(root: str) -> list[str]:
    rows, others = _rows(_csv_file(root))
    unread = [f"columns that are not read: {', '.join(others)}"] if others else []
    return unread + moved_up({row["camera"] for row in rows} - {""})


LAYOUT = Layout(
    "images in a csv list",
    "",
    (),
    {},
    _read,
    example="images/17.jpg,anna,3,train",
    root="FILE.csv with the columns path, identity, split and, if known, camera, or a folder with one such file",
    notes=_notes,
)

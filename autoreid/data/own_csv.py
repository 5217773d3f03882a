"""Your own images, listed in a .csv file: columns ``path``, ``identity``, ``split`` and, if there are any, ``camera``.

Paths are relative to the file. ``split`` is train, query or gallery. Identities are names, numbered like those of
``own_folder.py``: a 0 is somebody; -1 is junk. Cameras are numbers, or names numbered from 1 in sorted order; without
the column, or with nothing in it, the protocol is plain. Excel's semicolons, tabs and byte order mark are understood.
"""

from __future__ import annotations

import csv
import io
import os

from autoreid.data.layout import PARTS, Layout, Reading, Sample
from autoreid.data.own_folder import number
from autoreid.data.text import text_of
from autoreid.errors import UserError, unknown

COLUMNS = ("path", "identity", "camera", "split")


def _read(root: str, part: str) -> Reading:
    path = _csv_file(root)
    rows = _rows(path)
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
    return Reading(samples, [])


def _csv_file(root: str) -> str:
    if os.path.isfile(root):
        return root
    found = sorted(name for name in os.listdir(root) if name.lower().endswith(".csv") and not name.startswith("."))
    if len(found) != 1:
        listed = f" ({', '.join(found[:5])})" if found else ""
        raise UserError(f"dataset 'csv': {root} holds {len(found)} .csv files{listed}; give --root the file itself")
    return os.path.join(root, found[0])


def _rows(path: str) -> list[dict[str, str]]:
    """The rows, each with all COLUMNS; an absent camera is empty."""
    text = text_of(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    names = [name.strip().lower() for name in next(reader, [])]
    for column in COLUMNS:
        if column not in names and column != "camera":
            raise UserError(
                f"{path} has no column '{column}', its first line is '{header}'; the first line must name path, identity, "
                "split and, if known, camera"
            )
    rows = []
    for values in reader:
        if not any(value.strip() for value in values):
            continue
        row = dict.fromkeys(COLUMNS, "") | {name: value.strip() for name, value in zip(names, values)}
        for column in ("path", "identity", "split"):
            if not row[column]:
                raise UserError(f"{path} line {reader.line_num}: {column} is empty; fill it in or delete the line")
        row["split"], row["path"] = row["split"].lower(), row["path"].replace("\\", "/")
        if row["split"] not in PARTS:
            raise unknown(f"split in {path} line {reader.line_num}:", row["split"], PARTS)
        row["line"] = str(reader.line_num)
        rows.append(row)
    return rows


def _cameras(path: str, rows: list[dict[str, str]]) -> list[int]:
    """A number per row; all 0 where no row has a camera."""
    given = {row["camera"] for row in rows}
    if given <= {""}:
        return [0] * len(rows)
    if "" in given:
        line = next(row["line"] for row in rows if not row["camera"])
        raise UserError(f"{path} line {line}: camera is empty, but other rows have one; fill it in, or empty the column")
    if all(name.isdigit() for name in given):
        return [int(row["camera"]) for row in rows]
    numbers = {name: i for i, name in enumerate(sorted(given), start=1)}
    return [numbers[row["camera"]] for row in rows]


LAYOUT = Layout(
    "images in a csv list",
    "",
    (),
    {},
    _read,
    example="images/17.jpg,anna,3,train",
    root="FILE.csv with the columns path, identity, split and, if known, camera, or a folder with one such file",
)

"""VeRi-776 on disk (Liu et al., "A Deep Learning-Based Approach to Progressive Vehicle Re-identification", ECCV 2016).

A file name is ``0002_c002_00030600_0.jpg``: identity (4 digits), camera (THREE digits: Market's one-digit pattern would
read camera 0 everywhere), frame, index. The set has no junk files; the names are those of ``autoreid.data.market``.

Its authors also list, per query, who in the gallery is a match (``gt_index.txt``) and who is left out of the ranking
(``jk_index.txt``): an oracle for the rule "same identity, same camera" that needs no network.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from autoreid.data.layout import image_names
from autoreid.data.text import lines_of, text_of
from autoreid.errors import UserError

TITLE = "VeRi-776"
PROTOCOL = "veri"
KIND = "vehicles"
FOLDERS: tuple[str, ...] = (
    "VeRi/VeRi", "VeRi", "VeRi-776", "VeRi_776", "VeRi776", "VeRi_with_plate",
    "veri", "veri776", "veri-776", "veri_776",
)  # fmt: skip
PARTS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
PATTERN = re.compile(r"(-?\d+)_c(\d{3})(?!\d)")
EXAMPLE = "0002_c002_00030600_0.jpg"
IMAGES = {"train": 37_778, "query": 1_678, "gallery": 11_579}
IDENTITIES = {"train": 576, "query": 200, "gallery": 200}
CAMERAS = 20


class Oracle(NamedTuple):
    """The authors' own answer; a pair is (row of the query list, row of the gallery list), both from 1.

    The whole set has 107,106 good pairs and 11,589 junk pairs.
    """

    queries: list[str]
    gallery: list[str]
    good: list[tuple[int, int]]
    junk: list[tuple[int, int]]


def veri_oracle(folder: str | os.PathLike[str]) -> Oracle | None:
    """What gt_index.txt and jk_index.txt in the dataset's folder say, or None where they are not all there."""
    folder = os.fspath(folder)
    gallery, good, junk = (os.path.join(folder, name) for name in ("name_test.txt", "gt_index.txt", "jk_index.txt"))
    if not all(os.path.isfile(path) for path in (gallery, good, junk)):
        return None
    listed = os.path.join(folder, "name_query.txt")
    queries = [name for _, name in lines_of(listed)] if os.path.isfile(listed) else None
    queries = image_names(os.path.join(folder, PARTS["query"])) if queries is None else queries
    names = [name for _, name in lines_of(gallery)]
    return Oracle(queries, names, _pairs(good, len(queries), len(names)), _pairs(junk, len(queries), len(names)))


def _pairs(path: str, queries: int, gallery: int) -> list[tuple[int, int]]:
    """Line i lists the gallery rows of query i; an empty line is a query that has none, so none may be skipped."""
    lines = text_of(path).split("\n")
    while len(lines) > queries and not lines[-1].strip():
        lines.pop()
    try:
        pairs = [(i, int(row)) for i, line in enumerate(lines, start=1) for row in line.split()]
    except ValueError:
        pairs = [(0, 0)]
    if len(lines) != queries or not all(1 <= row <= gallery for _, row in pairs):
        raise UserError(
            f"{path} has {len(lines)} lines and must have {queries}, one per query, each with rows from 1 to {gallery} "
            "of name_test.txt; copy it again"
        )
    return pairs


def faults(folder: str) -> list[str]:
    """One line for each of the two lists that the rule "same identity, same camera" does not reproduce."""
    oracle = veri_oracle(folder)
    if oracle is None:
        return []
    sides = [[PATTERN.match(name) for name in names] for names in (oracle.queries, oracle.gallery)]
    if any(match is None for side in sides for match in side):
        return [f"name_query.txt or name_test.txt holds names that are not like {EXAMPLE}; copy them again"]
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    rows_of: dict[str, list[tuple[int, str]]] = {}
    for row, match in enumerate(sides[1], start=1):
        rows_of.setdefault(match[1], []).append((row, match[2]))  # type: ignore[index]
    for query, match in enumerate(sides[0], start=1):
        for row, camera in rows_of.get(match[1], []):  # type: ignore[index]
            found[camera == match[2]].add((query, row))  # type: ignore[index]
    return [
        f"{file}: {len(found[junk] ^ set(listed)):,} of its {len(listed):,} pairs are not those of the rule 'same "
        "identity, same camera is left out'; copy the lists and the images from one archive"
        for file, junk, listed in (("gt_index.txt", False, oracle.good), ("jk_index.txt", True, oracle.junk))
        if found[junk] != set(listed)
    ]

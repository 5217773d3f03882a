"""A searched cell as a value: two lists of (operation, input) pairs, with no network and no torch in sight.

A cell is a directed acyclic graph (Auto-ReID, Quan et al. 2019, section 3.1; the form is that of DARTS, Liu et al.
2018): inputs 0 and 1 are the outputs of the two previous cells, nodes are numbered from 2, each node sums two
operations applied to two distinct earlier states, and the cell's output concatenates the nodes named in ``concat``.
A network alternates a *normal* cell and, where the map is halved, a *reduction* cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoreid.errors import UserError, unknown
from autoreid.options import read_json

FORMAT, VERSION = "autoreid-genotype", 1

# Every operation a genotype may name; ops.py builds them. `none` is for the supernet only: a derived cell has no
# edge where nothing flows.
OPERATIONS = (
    "part_aware", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    "identity",
)
AXES = ("height", "width")

Pair = tuple[str, int]
Node = tuple[Pair, Pair]
CellGraph = tuple[Node, ...]


@dataclass(frozen=True)
class Genotype:
    """Two cells and how their part-aware operations cut the map.

    ``normal`` and ``reduction`` hold one node per entry, node ``i`` (numbered from 2) at index ``i - 2``.
    ``parts`` stripes are cut along ``axis``: "height" for people, "width" where parts lie side by side.
    ``provenance`` says where the genotype came from and takes no part in equality.

    Raises :class:`UserError` naming the cell, the node and the fault.
    """

    space: str
    normal: CellGraph
    reduction: CellGraph
    concat: tuple[int, ...]
    parts: int = 4
    axis: str = "height"
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("normal", "reduction"):
            _check_cell(name, getattr(self, name))
        if len(self.normal) != len(self.reduction):
            raise UserError(
                f"genotype: normal has {len(self.normal)} nodes and reduction {len(self.reduction)}: "
                "both cells must have the same number"
            )
        nodes = range(2, 2 + len(self.normal))
        if not self.concat or sorted(set(self.concat)) != list(self.concat) or not set(self.concat) <= set(nodes):
            raise UserError(
                f"genotype: concat is {list(self.concat)}; allowed: distinct node numbers from 2 to {nodes[-1]}, "
                "in rising order"
            )
        if type(self.parts) is not int or self.parts < 1:
            raise UserError(f"genotype: parts is {self.parts!r}; allowed: a whole number from 1")
        if self.axis not in AXES:
            raise unknown("axis", self.axis, AXES)

    # ------------------------------------------------------------------------------------ files
    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """The genotype in a parsed ``genotype.json``."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise UserError(f"not a genotype: format is {found!r}, expected {FORMAT!r}")
        if data.get("version") != VERSION:
            raise UserError(f"genotype: version {data.get('version')!r} is not known, this autoreid reads {VERSION}")
        missing = [name for name in ("space", "normal", "reduction", "concat") if name not in data]
        if missing:
            raise UserError(f"genotype: {' and '.join(missing)} missing; needed: space, normal, reduction, concat")
        known = {"format", "version", "space", "normal", "reduction", "concat", "parts", "axis", "provenance"}
        for name in data:
            if name not in known:
                raise unknown("genotype entry", name, known)
        if not isinstance(data["concat"], list) or not all(type(node) is int for node in data["concat"]):
            raise UserError(f"genotype: concat must be a list of node numbers, got {data['concat']!r}")
        if not isinstance(data.get("provenance", {}), Mapping):
            raise UserError(f"genotype: provenance must be an object, got {data['provenance']!r}")
        return cls(
            space=str(data["space"]),
            normal=_parse_cell("normal", data["normal"]),
            reduction=_parse_cell("reduction", data["reduction"]),
            concat=tuple(data["concat"]),
            parts=data.get("parts", 4),
            axis=data.get("axis", "height"),
            provenance=data.get("provenance", {}),
        )

    @classmethod
    def load(cls, path: str | Path) -> Genotype:
        """Read ``path``; every fault is a :class:`UserError` that begins with the path."""
        try:
            return cls.from_dict(read_json(path, "genotype"))
        except UserError as fault:
            raise at_path(path, fault) from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``parts`` and ``axis`` appear only where they differ from four stripes of the height."""
        cells = {name: [[list(pair) for pair in node] for node in getattr(self, name)] for name in ("normal", "reduction")}
        stripes = {} if (self.parts, self.axis) == (4, "height") else {"parts": self.parts, "axis": self.axis}
        return {
            "format": FORMAT, "version": VERSION, "space": self.space, **cells, "concat": list(self.concat),
            **stripes, "provenance": dict(self.provenance),
        }

    def to_json(self) -> str:
        """The file's text: one line per node, so that two genotypes can be compared by eye and by ``diff``."""
        data = self.to_dict()
        for name in ("normal", "reduction"):
            data[name] = f"@{name}"
        text = json.dumps(data, indent=1)
        for name in ("normal", "reduction"):
            lines = ",\n  ".join(json.dumps([list(pair) for pair in node]) for node in getattr(self, name))
            text = text.replace(f'"@{name}"', f"[\n  {lines}\n ]")
        concat = json.dumps(list(self.concat))
        return text.replace(json.dumps(list(self.concat), indent=1).replace("\n", "\n "), concat) + "\n"

    # ------------------------------------------------------------------------------------ identity
    def key(self) -> str:
        """Twelve hexadecimal digits, equal exactly for genotypes that build the same network up to a renumbering.

        Renumbering the nodes only permutes channels of the output, and the order of a node's two pairs only the
        terms of a sum; neither changes what can be learned. A node that nothing reads is not part of the cell.
        """
        cells = [_canonical(cell, self.concat) for cell in (self.normal, self.reduction)]
        uses_parts = any(op == "part_aware" for cell in cells for node in cell[0] for op, _ in node)
        stripes = [self.parts, self.axis] if uses_parts else []
        return hashlib.sha256(json.dumps([cells, stripes]).encode()).hexdigest()[:12]


def at_path(path: str | Path, fault: UserError) -> UserError:
    """The fault with the file's path in front, once."""
    return fault if str(fault).startswith(str(path)) else UserError(f"{path}: {fault}")


def _parse_cell(name: str, cell: Any) -> CellGraph:
    """Lists from JSON to tuples; the shape is checked here, the meaning in :func:`_check_cell`."""
    if not isinstance(cell, list) or not cell:
        raise UserError(f"genotype: {name} must be a list of nodes, got {cell!r}")
    nodes = []
    for number, node in enumerate(cell, start=2):
        well_formed = (
            isinstance(node, list) and len(node) == 2
            and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and type(p[1]) is int for p in node)
        )
        if not well_formed:
            raise UserError(f"genotype: {name} node {number} must be two [operation, input] pairs, got {node!r}")
        nodes.append(((node[0][0], node[0][1]), (node[1][0], node[1][1])))
    return tuple(nodes)


def _check_cell(name: str, cell: CellGraph) -> None:
    for number, node in enumerate(cell, start=2):
        if len(node) != 2:
            raise UserError(f"genotype: {name} node {number} has {len(node)} pairs; allowed: exactly two")
        for op, source in node:
            if op not in OPERATIONS:
                raise unknown(f"operation in {name} node {number}", op, OPERATIONS)
            if not 0 <= source < number:
                raise UserError(
                    f"genotype: {name} node {number} reads input {source}; allowed: 0 to {number - 1} "
                    "(a node reads earlier states only)"
                )
        if node[0][1] == node[1][1]:
            raise UserError(
                f"genotype: {name} node {number} reads input {node[0][1]} twice; its two inputs must be distinct"
            )


# ---------------------------------------------------------------------------------------- isomorphism
def _canonical(cell: CellGraph, concat: Iterable[int]) -> tuple[list[list[list[Any]]], list[int]]:
    """The smallest form of a cell over all renumberings of its live nodes; at most 4! for the usual four nodes."""
    outputs = set(concat)
    live = _live(cell, outputs)
    best = None
    for order in _topological_orders(cell, live):
        place = {0: 0, 1: 1, **{node: i for i, node in enumerate(order, start=2)}}
        nodes = [sorted([op, place[source]] for op, source in cell[node - 2]) for node in order]
        form = (nodes, sorted(place[node] for node in live & outputs))
        if best is None or form < best:
            best = form
    assert best is not None
    return best


def _live(cell: CellGraph, outputs: set[int]) -> set[int]:
    live: set[int] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node >= 2 and node not in live:
            live.add(node)
            waiting.extend(source for _, source in cell[node - 2])
    return live


def _topological_orders(cell: CellGraph, live: set[int], done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if len(done) == len(live):
        yield done
    for node in sorted(live.difference(done)):
        if all(source < 2 or source in done for _, source in cell[node - 2]):
            yield from _topological_orders(cell, live, (*done, node))


def input_pairs(number: int) -> list[tuple[int, int]]:
    """The pairs of distinct inputs that node ``number`` may read."""
    return list(itertools.combinations(range(number), 2))

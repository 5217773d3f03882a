"""A search space as a value: the operations an edge may hold and the size of a cell. No torch.

A space is declared in a JSON file of ``search_spaces/``; ``reid.json`` is Auto-ReID's (section 3.3), ``standard.json``
the same without its part-aware module. :meth:`SearchSpace.random` and :meth:`SearchSpace.mutate` give the controls
that a search must beat.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from autoreid.errors import UserError, unknown
from autoreid.genotype import AXES, OPERATIONS, CellGraph, Genotype, Node, at_path, input_pairs
from autoreid.options import read_json


@dataclass(frozen=True)
class SearchSpace:
    """``operations`` on every edge of a cell of ``nodes`` nodes; ``none`` may be among them (it means "no edge").

    ``parts`` stripes along ``axis`` are how the part-aware operation cuts the map. Raises :class:`UserError` naming
    the fault.
    """

    name: str
    operations: tuple[str, ...]
    nodes: int = 4
    parts: int = 4
    axis: str = "height"
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"search space: name is {self.name!r}; allowed: letters, digits, '.', '_' and '-'")
        where = f"search space {self.name}"
        for op in self.operations:
            if op not in (*OPERATIONS, "none"):
                raise unknown(f"operation in {where}", op, (*OPERATIONS, "none"))
        if len(set(self.operations)) != len(self.operations):
            raise UserError(f"{where}: an operation is listed twice in {list(self.operations)}")
        if len(self.choices) < 2:
            raise UserError(
                f"{where}: only {list(self.choices)} besides none; nothing to search: list at least two operations"
            )
        if type(self.nodes) is not int or not 1 <= self.nodes <= 8:
            raise UserError(f"{where}: nodes is {self.nodes!r}; allowed: 1 to 8")
        if type(self.parts) is not int or self.parts < 1:
            raise UserError(f"{where}: parts is {self.parts!r}; allowed: a whole number from 1")
        if self.axis not in AXES:
            raise unknown("axis", self.axis, AXES)

    @property
    def choices(self) -> tuple[str, ...]:
        """The operations a derived edge may hold: all but ``none``."""
        return tuple(op for op in self.operations if op != "none")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Every (node, input) of a cell, in the order of the alphas' rows: node 2's inputs, node 3's, ..."""
        return tuple((node, source) for node in range(2, 2 + self.nodes) for source in range(node))

    @property
    def concat(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + self.nodes))

    # ------------------------------------------------------------------------------------ files
    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SearchSpace:
        if not isinstance(data, dict):
            raise UserError(f"search space: must be a JSON object, got {data!r}")
        known = {"name", "operations", "nodes", "parts", "axis", "source"}
        for name in data:
            if name not in known:
                raise unknown("search space entry", name, known)
        if not {"name", "operations"} <= set(data):
            raise UserError("search space: name and operations are needed")
        if not isinstance(data["operations"], list):
            raise UserError(f"search space: operations must be a list of names, got {data['operations']!r}")
        return cls(**{**data, "operations": tuple(data["operations"])})

    @classmethod
    def load(cls, name: str) -> SearchSpace:
        """A space by name (a file of ``search_spaces/``) or by the path of a JSON file."""
        path = Path(name) if name.endswith(".json") else space_folder() / f"{name}.json"
        if not name.endswith(".json") and not path.is_file():
            raise unknown("search space", name, known_spaces())
        try:
            return cls.from_dict(read_json(path, "search space"))
        except UserError as fault:
            raise at_path(path, fault) from None

    # ------------------------------------------------------------------------------------ its genotypes
    def size(self) -> int:
        """How many genotypes there are: per node C(inputs, 2) pairs of inputs times two operations, two cells."""
        per_cell = math.prod(math.comb(node, 2) * len(self.choices) ** 2 for node in range(2, 2 + self.nodes))
        return per_cell**2

    def genotype(self, normal: CellGraph, reduction: CellGraph, **provenance: Any) -> Genotype:
        """A genotype of this space; its operations must be among :attr:`choices`."""
        for node in (*normal, *reduction):
            for op, _ in node:
                if op not in self.choices:
                    raise unknown(f"operation in the space {self.name}", op, self.choices)
        return Genotype(self.name, normal, reduction, self.concat, self.parts, self.axis, provenance)

    def random(self, seed: int) -> Genotype:
        """A genotype drawn uniformly: the control that every search must beat."""
        rng = Random(seed)
        cells = [tuple(self._random_node(rng, node) for node in range(2, 2 + self.nodes)) for _ in range(2)]
        return self.genotype(*cells, method="random", seed=seed)

    def mutate(self, parent: Genotype, seed: int) -> Genotype:
        """A neighbour: one operation or one input of one node changed (Real et al. 2019, section 3.1)."""
        rng = Random(seed)
        cells = [list(parent.normal), list(parent.reduction)]
        which, index, slot = rng.randrange(2), rng.randrange(self.nodes), rng.randrange(2)
        pairs = list(cells[which][index])
        op, source = pairs[slot]
        other = pairs[1 - slot][1]
        free = [s for s in range(index + 2) if s not in (source, other)]  # node 2 has no third input
        if free and rng.random() < 0.5:
            pairs[slot] = (op, rng.choice(free))
        else:
            pairs[slot] = (rng.choice([o for o in self.choices if o != op]), source)
        cells[which][index] = (pairs[0], pairs[1])
        return self.genotype(tuple(cells[0]), tuple(cells[1]), method="mutation", seed=seed, parent=parent.key())

    def _random_node(self, rng: Random, node: int) -> Node:
        first, second = rng.choice(input_pairs(node))
        return (rng.choice(self.choices), first), (rng.choice(self.choices), second)


def space_folder() -> Path:
    """``search_spaces/``: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "search_spaces"


def known_spaces() -> list[str]:
    return sorted(path.stem for path in space_folder().glob("*.json"))


def published() -> dict[str, Path]:
    """The published genotypes by name."""
    return {path.stem: path for path in sorted((space_folder() / "published").glob("*.json"))}

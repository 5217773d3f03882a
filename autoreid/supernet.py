"""The supernet: every edge of every cell is a mixture of the space's operations, weighted by the alphas.

Two relaxations of the discrete choice, one Cell for both:

- DARTS (Liu et al. 2018, eq. 2): an edge is sum_o softmax(alpha)_o o(x).
- GDAS (Dong and Yang 2019, eq. 3-5): one operation per edge is drawn by the Gumbel-max trick and only it runs; the
  gradient passes through the softmax at temperature tau (straight-through).

Decisions in the cells while searching, where published codes differ:

- batch norms have no scale and shift (affine=False, DARTS), and track running statistics so that the supernet can be
  validated in eval mode; an architecture step does not move them (search.py);
- pooling is followed by a batch norm (DARTS; the GDAS code and NNI have none), so that no operation wins by its scale;
- convolutions have no bias (DARTS; AutoDL's code adds one where affine is False);
- there is no drop-path while searching (DARTS; AutoDL's code has it);
- the alphas, their softmax and GDAS' hard weights are never in half precision: they are parameters in float32, and
  autocast computes a softmax in float32;
- GDAS' noise is bounded away from infinity instead of drawn again (its code redraws on infinity or NaN).

``alphas`` are parameters of the module, so they are in its ``state_dict``; the architecture step takes
``torch.autograd.grad(loss, supernet.arch_parameters())``, so that a validation gradient can never reach the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoreid.cell import Cell, make_stem, plan_cells
from autoreid.errors import UserError
from autoreid.genotype import CellGraph, Genotype
from autoreid.ops import OPS, Stripes
from autoreid.space import SearchSpace

KINDS = ("normal", "reduction")
# by kind of cell: a row per edge (a matrix, DARTS) or a choice per edge (GDAS)
EdgeWeights = Mapping[str, "Tensor | Sequence[Sampled]"]


@dataclass(frozen=True)
class Sampled:
    """GDAS' choice for one edge: the operation's index (-1: no edge) and, on the graph of alpha, its weight (value 1).

    ``rest`` is the sum of the other operations' straight-through weights (value 0), or None: see ``gdas_gradient``.
    """

    index: int
    weight: Tensor
    rest: Tensor | None


class MixedOp(nn.Module):
    """All operations of the space on one edge. ``none`` is not built: it adds zero, only its softmax mass counts.

    ``forward(x, weights)`` with ``weights`` a vector of one weight per operation (DARTS: all run), or a
    :class:`Sampled` (GDAS: one runs).
    """

    def __init__(self, operations: Sequence[str], channels: int, stride: int, stripes: Stripes) -> None:
        super().__init__()
        self.names, self.stride = tuple(operations), stride
        self.operations = nn.ModuleDict(
            {name: OPS[name](channels, stride, True, stripes) for name in operations if name != "none"}
        )

    def forward(self, x: Tensor, weights: Tensor | Sampled) -> Tensor:
        if isinstance(weights, Sampled):
            return self._sampled(x, weights)
        terms = [weights[i] * self.operations[name](x) for i, name in enumerate(self.names) if name != "none"]
        return sum(terms[1:], start=terms[0])

    def _sampled(self, x: Tensor, choice: Sampled) -> Tensor:
        name = self.names[choice.index] if choice.index >= 0 else "none"
        if name == "none":  # a real zero, not 0 * x, which would keep NaN and infinity
            height, width = (-(-side // self.stride) for side in x.shape[2:])
            y = x.new_zeros(x.shape[0], x.shape[1], height, width)
        else:
            y = choice.weight.to(x.dtype) * self.operations[name](x)
        return y if choice.rest is None else y + choice.rest.to(x.dtype)


class Supernet(nn.Module):
    """The space's cells, stacked as the derived network will be (paper's search: channels 32, layers 2,2,2,2).

    ``forward(images: B x 3 x H x W, weights) -> B x dims`` pooled features, with ``weights`` from
    :meth:`softmax_weights` or :meth:`sample`: one entry per kind of cell, shared by all cells of the kind, so that
    one draw of GDAS holds for a whole forward pass.
    """

    def __init__(
        self,
        space: SearchSpace,
        channels: int = 32,
        layers: Sequence[int] = (2, 2, 2, 2),
        stem: str = "pool",
    ) -> None:
        super().__init__()
        if len(layers) < 2:
            raise UserError(f"layers={list(layers)}: a search needs at least two stages, or there is no reduction cell")
        self.space = space
        stripes = Stripes(space.parts, space.axis)
        self.stem = make_stem(stem, channels)
        plans = plan_cells(channels, layers, len(space.concat))
        self.cells = nn.ModuleList(
            Cell(
                plan,
                nodes=[range(node) for node in space.concat],
                concat=space.concat,
                edge=lambda number, source, stride: MixedOp(space.operations, plan.channels, stride, stripes),  # noqa: B023
                affine=False,
            )
            for plan in plans
        )
        # DARTS' initialisation, nearly uniform: 1e-3 * N(0, 1); a row per edge, a column per operation
        self.alphas = nn.ParameterDict(
            {kind: nn.Parameter(1e-3 * torch.randn(len(space.edges), len(space.operations))) for kind in KINDS}
        )
        self.dims = plans[-1].channels * len(space.concat)

    def arch_parameters(self) -> list[nn.Parameter]:
        """The two alphas, normal first: always the same order, so that an optimiser's state can be resumed."""
        return [self.alphas[kind] for kind in KINDS]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but the alphas."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas.")]

    def forward(self, images: Tensor, weights: EdgeWeights) -> Tensor:
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights[str(cell.kind)])
        return s1.mean(dim=(2, 3))

    # ------------------------------------------------------------------------------------ weights of the edges
    def softmax_weights(self, detach: bool = False) -> dict[str, Tensor]:
        """DARTS: the softmax of every edge over all operations, ``none`` included.

        ``detach`` in the weight step: the alphas need no gradient there, and the reductions for it are saved.
        """
        return {
            kind: torch.softmax(alpha.detach() if detach else alpha, dim=1)
            for kind, alpha in self.alphas.items()
        }

    def sample(
        self, tau: float, generator: torch.Generator, gradient: str = "sampled", detach: bool = False
    ) -> dict[str, Sequence[Sampled]]:
        """GDAS: draw one operation per edge and kind of cell, at temperature ``tau``.

        ``gradient`` "sampled": the output is hard[k] * o_k(x), and alpha learns through the softmax of the drawn
        entry (the published ``gdas_v1`` and NASNet-space cell). "all": the zeros hard[j], j != k, are added too, so
        that every alpha gets a direct gradient (the published NAS-Bench-201 form). Which is better is an open
        question in the authors' own issue tracker; the first is the default.

        The noise comes from a CPU ``generator`` (resume, and equal draws on every machine) and the indices reach the
        host in one transfer.
        """
        probabilities = {}
        for kind, alpha in self.alphas.items():
            alpha = alpha.detach() if detach else alpha
            exponential = torch.empty(alpha.shape, dtype=alpha.dtype).exponential_(generator=generator)
            gumbel = -exponential.clamp_min(1e-30).log().to(alpha.device)
            probabilities[kind] = torch.softmax((torch.log_softmax(alpha, dim=1) + gumbel) / tau, dim=1)
        drawn = torch.cat([p.argmax(dim=1) for p in probabilities.values()]).tolist()  # the one transfer
        weights: dict[str, Sequence[Sampled]] = {}
        for kind, p in probabilities.items():
            indices, drawn = drawn[: len(p)], drawn[len(p) :]
            weights[kind] = [self._straight_through(row, index, gradient) for row, index in zip(p, indices, strict=True)]
        return weights

    @staticmethod
    def _straight_through(row: Tensor, index: int, gradient: str) -> Sampled:
        """hard = onehot - stop(p) + p: value one or zero, gradient of p."""
        soft = row - row.detach()
        rest = soft.sum() - soft[index] if gradient == "all" else None
        return Sampled(index, 1.0 + soft[index], rest)

    def derived_weights(self) -> dict[str, Sequence[Sampled]]:
        """The path that :meth:`derive` would keep, with the supernet's weights: every other edge is left out."""
        genotype, one = self.derive(), torch.ones(())
        weights: dict[str, Sequence[Sampled]] = {}
        for kind, graph in zip(KINDS, (genotype.normal, genotype.reduction), strict=True):
            kept = {(node, source): op for node, pairs in enumerate(graph, start=2) for op, source in pairs}
            index = {edge: self.space.operations.index(op) for edge, op in kept.items()}
            weights[kind] = [Sampled(index.get(edge, -1), one, None) for edge in self.space.edges]
        return weights

    # ------------------------------------------------------------------------------------ to a genotype
    def derive(self, **provenance) -> Genotype:
        """DARTS' rule (section 2.4, as Auto-ReID section 3.1): see :func:`derive_cell`."""
        weights = {kind: w.detach().cpu().tolist() for kind, w in self.softmax_weights().items()}
        cells = [derive_cell(self.space, weights[kind]) for kind in KINDS]
        return Genotype(
            self.space.name, cells[0], cells[1], self.space.concat, self.space.parts, self.space.axis, provenance
        )


def derive_cell(space: SearchSpace, weights: Sequence[Sequence[float]]) -> CellGraph:
    """The two strongest edges of every node, each with its strongest operation.

    ``weights`` are the softmax over all operations *including none*; an edge is as strong as its best operation other
    than none (so an edge that prefers none is weak, though none itself is never derived). Edges, not (operation, edge)
    pairs, are ranked: the inputs of a node are always distinct, unlike by the rule of the GDAS code. Ties go to the
    lower input and to the operation named first.
    """
    candidates = [i for i, op in enumerate(space.operations) if op != "none"]
    nodes = []
    for node in space.concat:
        strongest = []
        for row, (owner, source) in zip(weights, space.edges, strict=True):
            if owner == node:
                best = max(candidates, key=lambda i: (row[i], -i))
                strongest.append((row[best], -source, space.operations[best]))
        first, second = sorted(strongest, reverse=True)[:2]
        nodes.append(((first[2], -first[1]), (second[2], -second[1])))
    return tuple(nodes)

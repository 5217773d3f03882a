"""One Cell for the search and for the derived network, and the plan by which cells are stacked.

An edge of the cell holds an operation (derived network) or a mixture of operations (supernet); the cell does not
know which. Source: DARTS (Liu et al. 2018, section 2.1); the macro structure is Auto-ReID's (Quan et al. 2019,
section 3.2: "the macro structure of ResNet, where each residual layer is replaced by a neural cell").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoreid.errors import UserError, unknown
from autoreid.ops import FactorizedReduce, ReLUConvBN


@dataclass(frozen=True)
class CellPlan:
    """The place of one cell: channels of the two inputs, its own width, and whether it or the one before reduces."""

    stage: int
    channels_before: int
    channels_previous: int
    channels: int
    reduction: bool
    after_reduction: bool

    @property
    def kind(self) -> str:
        return "reduction" if self.reduction else "normal"


def plan_cells(channels: int, layers: Sequence[int], outputs: int) -> list[CellPlan]:
    """Where every cell of a network stands.

    Stage ``s`` (from 0) has ``layers[s]`` cells of width ``channels * 2**s``; the first cell of every stage but the
    first halves the map. A cell emits ``outputs`` (the length of the genotype's ``concat``) times its width. The two
    inputs of the first cell are both the stem's output, ``channels`` wide.
    """
    if channels < 2 or not layers or min(layers) < 1:
        raise UserError(
            f"channels={channels}, layers={list(layers)}: channels must be at least 2 and every stage needs a cell, "
            "as in channels=64, layers=2,2,2,2"
        )
    plans, before, previous, after = [], channels, channels, False
    for stage, count in enumerate(layers):
        for position in range(count):
            width, reduction = channels * 2**stage, stage > 0 and position == 0
            plans.append(CellPlan(stage, before, previous, width, reduction, after))
            before, previous, after = previous, width * outputs, reduction
    return plans


class Cell(nn.Module):
    """Nodes that sum their edges; the output concatenates the nodes in ``concat``.

    ``nodes[i]`` lists the inputs of node ``i + 2``; ``edge(number, input, stride)`` makes the module of one edge. The
    stride is 2 on the edges that read the cell's two inputs when the cell reduces, else 1.

    Forward: s0 and s1 are the outputs of the two previous cells (B x C' x H' x W'); returns
    B x (len(concat) * channels) x H x W. ``weights``, if given, holds one entry per edge in the order of ``nodes``
    and is passed to that edge with its input.
    """

    def __init__(
        self,
        plan: CellPlan,
        nodes: Sequence[Sequence[int]],
        concat: Sequence[int],
        edge: Callable[[int, int, int], nn.Module],
        affine: bool,
    ) -> None:
        super().__init__()
        # s0 is twice as large as s1 right after a reduction (DARTS, cnn/model.py: preprocess0)
        fit = FactorizedReduce if plan.after_reduction else ReLUConvBN
        self.preprocess0: nn.Module = fit(plan.channels_before, plan.channels, affine)
        self.preprocess1: nn.Module = ReLUConvBN(plan.channels_previous, plan.channels, affine)
        self.edges = nn.ModuleList(
            edge(number, source, 2 if plan.reduction and source < 2 else 1)
            for number, sources in enumerate(nodes, start=2)
            for source in sources
        )
        self.nodes, self.concat, self.kind = [list(sources) for sources in nodes], list(concat), plan.kind

    def forward(self, s0: Tensor, s1: Tensor, weights: Sequence | None = None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edges = iter(range(len(self.edges)))
        for sources in self.nodes:
            terms = []
            for source in sources:
                k = next(edges)
                x = states[source]
                terms.append(self.edges[k](x) if weights is None else self.edges[k](x, weights[k]))
            states.append(sum(terms[1:], start=terms[0]))
        return torch.cat([states[node] for node in self.concat], dim=1)


def stem_pool(channels: int) -> nn.Sequential:
    """3 x 3 convolution of stride 2 and 3 x 3 max pooling of stride 2: a quarter of the height and width.

    Auto-ReID says "3x3 convolutional head"; only a total stride of 4 gives its FLOPs, and this form fits best.
    """
    return nn.Sequential(*_conv_bn(3, channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def stem_conv(channels: int) -> nn.Sequential:
    """Two 3 x 3 convolutions of stride 2, as DARTS' ImageNet stem: a quarter of the height and width."""
    return nn.Sequential(*_conv_bn(3, channels), nn.ReLU(), *_conv_bn(channels, channels))


def stem_half(channels: int) -> nn.Sequential:
    """One 3 x 3 convolution of stride 2: half of the height and width, for small pictures."""
    return nn.Sequential(*_conv_bn(3, channels), nn.ReLU())


STEMS = {"pool": stem_pool, "conv": stem_conv, "half": stem_half}


def make_stem(name: str, channels: int) -> nn.Sequential:
    if channels < 2:
        raise UserError(f"channels={channels}: allowed is 2 or more")
    if name not in STEMS:
        raise unknown("stem", name, STEMS)
    return STEMS[name](channels)


def _conv_bn(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, 2, 1, bias=False), nn.BatchNorm2d(channels_out)]

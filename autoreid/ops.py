"""The operations that an edge of a cell may hold, in one table: ``OPS[name](channels, stride, searching, stripes)``.

Operations follow DARTS (Liu et al. 2018, cnn/operations.py: pre-activation ReLU-conv-BN, a separable convolution
applied twice, a depthwise dilated one once); the part-aware module follows Auto-ReID (Quan et al. 2019, section 3.3)
in the form its authors published (AutoDL-Projects, ``PartAwareOp``). Every operation maps B x C x H x W to
B x C x ceil(H / stride) x ceil(W / stride), for any H and W.

``searching`` turns the batch norms' scale and shift off (affine=False, the alphas are the scale) and puts a batch
norm after pooling, both as DARTS does in its search; the derived network has affine norms and bare pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stripes(NamedTuple):
    """How the part-aware module cuts a map: ``parts`` stripes along ``axis`` ("height" or "width")."""

    parts: int = 4
    axis: str = "height"


class ReLUConvBN(nn.Sequential):
    """ReLU, 1 x 1 convolution, batch norm: fits a cell's input to the cell's width."""

    def __init__(self, channels_in: int, channels_out: int, affine: bool) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, affine=affine),
        )


class HalvingConv(nn.Module):
    """Two 1 x 1 convolutions of stride 2, the second one pixel down and right: halves a map without losing three
    quarters of it (DARTS' FactorizedReduce). B x Cin x H x W -> B x Cout x ceil(H / 2) x ceil(W / 2).

    An odd height or width is padded with one row or column of zeros; DARTS' own form breaks there.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out // 2, 1, stride=2, bias=False)
        self.second = nn.Conv2d(channels_in, channels_out - channels_out // 2, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        shifted = F.pad(x, (0, width % 2, 0, height % 2))[:, :, 1:, 1:]
        return torch.cat([self.first(x), self.second(shifted)], dim=1)


class FactorizedReduce(nn.Sequential):
    """ReLU, :class:`HalvingConv`, batch norm."""

    def __init__(self, channels_in: int, channels_out: int, affine: bool) -> None:
        super().__init__(
            nn.ReLU(), HalvingConv(channels_in, channels_out), nn.BatchNorm2d(channels_out, affine=affine)
        )


def stripe_bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Where each stripe of a side of ``length`` begins and ends: stripe i covers floor(i L / M) .. floor((i+1) L / M).

    A side shorter than ``parts`` has one stripe per row, so that no stripe is ever empty.
    """
    parts = min(parts, length)
    return [(i * length // parts, (i + 1) * length // parts) for i in range(parts)]


class PartAware(nn.Module):
    """Auto-ReID's part-aware module (section 3.3, figure 2), for any height and width.

    The map is cut into M stripes; each is averaged to a vector and transformed to a *body vector* p (a linear layer
    and batch norm of its own per stripe); self-attention mixes the M vectors; each is repeated over its stripe,
    concatenated with the input, and a 1 x 1 convolution fuses the two.

    Decisions (the paper gives no sizes): C // 3 hidden channels, a layer per stripe, A = softmax(K Q^T) without
    1/sqrt(d) and out = A p without a value projection, all as in the authors' code; the fusion is ReLU-conv-BN at
    both strides, as every other operation here (the authors' stride-1 form has no ReLU); at stride 2 it is the
    :class:`HalvingConv` on the full map.

    The concatenation is never made: conv([x; e]) = conv_x(x) + conv_e(e), and e is constant over a stripe, so conv_e
    acts on M vectors instead of H x W pixels. tests/reference.py holds the literal form.
    """

    def __init__(self, channels: int, stride: int, affine: bool, stripes: Stripes) -> None:
        super().__init__()
        hidden = max(channels // 3, 1)
        self.stripes = stripes
        self.body = nn.ModuleList(nn.Linear(channels, hidden) for _ in range(stripes.parts))
        self.body_norm = nn.ModuleList(nn.BatchNorm1d(hidden, affine=affine) for _ in range(stripes.parts))
        self.key = nn.Linear(hidden, hidden)
        self.query = nn.Linear(hidden, hidden)
        fuse: nn.Module = nn.Conv2d(channels, channels, 1, bias=False)
        self.fuse_input = fuse if stride == 1 else HalvingConv(channels, channels)
        self.fuse_body = nn.Linear(hidden, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.stride = stride

    def body_vectors(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x M x hidden, after the attention; M = min(parts, H)."""
        rows = x.mean(dim=3)  # B x C x H
        vectors = [
            norm(linear(F.relu(rows[:, :, low:high].mean(dim=2))))  # B x hidden
            for (low, high), linear, norm in zip(
                stripe_bounds(x.shape[2], self.stripes.parts), self.body, self.body_norm, strict=False
            )
        ]
        p = torch.stack(vectors, dim=1)  # B x M x hidden
        attention = torch.softmax(self.key(p) @ self.query(p).transpose(1, 2), dim=2)  # B x M x M
        return attention @ p

    def forward(self, x: Tensor) -> Tensor:
        if self.stripes.axis == "width":
            x = x.transpose(2, 3)
        height, width = x.shape[2:]
        e = self.fuse_body(F.relu(self.body_vectors(x))).transpose(1, 2)  # B x C x M
        e = torch.cat(
            [e[:, :, i : i + 1].expand(-1, -1, high - low)
             for i, (low, high) in enumerate(stripe_bounds(height, self.stripes.parts))], dim=2,
        )  # B x C x H: each row has its stripe's vector
        y = self.fuse_input(F.relu(x))
        if self.stride == 1:
            y = y + e.unsqueeze(3)
        else:  # rows and columns 0, 2, ... for the first half of the channels, 1, 3, ... for the second
            half = y.shape[1] // 2
            second = e[:, half:, 1::2].unsqueeze(3).expand(-1, -1, -1, width // 2)
            second = F.pad(second, (0, width % 2, 0, height % 2))  # HalvingConv's zero row and column hold no stripe
            y = y + torch.cat([e[:, :half, ::2].unsqueeze(3).expand(-1, -1, -1, y.shape[3]), second], dim=1)
        y = self.norm(y)
        return y.transpose(2, 3) if self.stripes.axis == "width" else y


def _separable(kernel: int, stride: int, dilation: int, channels: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise k x k, pointwise 1 x 1, batch norm."""
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def sep_conv(kernel: int, channels: int, stride: int, searching: bool) -> nn.Module:
    """A depthwise-separable convolution applied twice, the stride in the first."""
    return nn.Sequential(
        *_separable(kernel, stride, 1, channels, not searching), *_separable(kernel, 1, 1, channels, not searching)
    )


def dil_conv(kernel: int, channels: int, stride: int, searching: bool) -> nn.Module:
    """A depthwise-separable convolution with dilation 2, applied once."""
    return nn.Sequential(*_separable(kernel, stride, 2, channels, not searching))


def pool(kind: str, channels: int, stride: int, searching: bool) -> nn.Module:
    """3 x 3 pooling; the average leaves the padding out of its count."""
    layer: nn.Module = (
        nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    )
    return nn.Sequential(layer, nn.BatchNorm2d(channels, affine=False)) if searching else layer


def identity(channels: int, stride: int, searching: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=not searching)


# To add an operation: write its function above, name it here and in genotype.OPERATIONS, and list it in a space.
OPS: dict[str, Callable[[int, int, bool, Stripes], nn.Module]] = {
    "part_aware": lambda c, s, searching, stripes: PartAware(c, s, not searching, stripes),
    "max_pool_3x3": lambda c, s, searching, _: pool("max", c, s, searching),
    "avg_pool_3x3": lambda c, s, searching, _: pool("avg", c, s, searching),
    "sep_conv_3x3": lambda c, s, searching, _: sep_conv(3, c, s, searching),
    "sep_conv_5x5": lambda c, s, searching, _: sep_conv(5, c, s, searching),
    "dil_conv_3x3": lambda c, s, searching, _: dil_conv(3, c, s, searching),
    "dil_conv_5x5": lambda c, s, searching, _: dil_conv(5, c, s, searching),
    "identity": lambda c, s, searching, _: identity(c, s, searching),
}

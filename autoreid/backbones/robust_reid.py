"""Robust-ReID (Lawen et al., "Attention Network Robustification for Person ReID", 2019, arXiv 1910.07038).

HA-CNN with shuffle blocks, deeper and wider.

Structure: the paper's table 1. A stage is Shuffle-B, n x Shuffle-A, Shuffle-B, the last of stride 2; a local block is one
Shuffle-B. The blocks are ShuffleNetV2's units (Ma et al. 2018; the paper's figure 5), the attention is HA-CNN's.

Where the paper contradicts itself or is silent, the default and why:
- local blocks have stride 2, shared by the regions: the table prints 1, but its own sizes 24x28, 12x14, 6x7, 3x4 need 2;
- convolutions have a bias: only so both FLOPs figures (0.72 and 1.68 B, cost.py's ``macs_all``) are met;
- 2x has 5.79 M parameters, as the table's layers add up to; the 6.4 M printed below them are not in the table.
The embedding (512 or 960 a stream, generalised mean with an exponent a channel, vectors of length one) is heads.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoreid.backbones.ha_cnn import HEAD as HA_CNN_HEAD
from autoreid.backbones.ha_cnn import ConvBNReLU, HarmoniousNet, InceptionB, ha_cnn, inception_stage
from autoreid.errors import UserError, unknown


def channel_shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels: 0, C/2, 1, C/2 + 1, ..."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def depthwise(channels: int, stride: int, bias: bool) -> list[nn.Module]:
    """A 3 x 3 convolution for each channel and a batch norm; no ReLU, as in ShuffleNetV2."""
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=bias), nn.BatchNorm2d(channels)]


class ShuffleA(nn.Module):
    """Half the channels pass as they are, half through 1 x 1, depthwise 3 x 3, 1 x 1. Keeps size and channels."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            ConvBNReLU(half, half, 1, bias=bias), *depthwise(half, 1, bias), ConvBNReLU(half, half, 1, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat([kept, self.branch(changed)], dim=1))


class ShuffleB(nn.Module):
    """Both branches see all channels and give half of them; changes the channels and, with stride 2, the size."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 2, bias: bool = True) -> None:
        super().__init__()
        half = channels_out // 2
        self.short = nn.Sequential(
            *depthwise(channels_in, stride, bias), ConvBNReLU(channels_in, half, 1, bias=bias)
        )
        self.long = nn.Sequential(
            ConvBNReLU(channels_in, half, 1, bias=bias),
            *depthwise(half, stride, bias),
            ConvBNReLU(half, half, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(torch.cat([self.short(x), self.long(x)], dim=1))


def shuffle_stage(channels_in: int, channels_out: int, repeats: int, bias: bool) -> nn.Module:
    """Shuffle-B, ``repeats`` x Shuffle-A, Shuffle-B of stride 2: the map is halved last, so most of it runs large."""
    return nn.Sequential(
        ShuffleB(channels_in, channels_out, 1, bias),
        *(ShuffleA(channels_out, bias) for _ in range(repeats)),
        ShuffleB(channels_out, channels_out, 2, bias),
    )


BLOCKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {  # a stage, a local block
    "shuffle": (shuffle_stage, ShuffleB),
    "inception": (inception_stage, InceptionB),
}


def robust_reid(
    stem: int,
    channels: Sequence[int],
    repeats: Sequence[int],
    block: str,
    conv_bias: bool,
    local_stride: int,
    shared_local: bool,
) -> HarmoniousNet:
    """``repeats`` counts, for each stage, the A blocks between its first block and its last one."""
    if block not in BLOCKS:
        raise unknown("block", block, BLOCKS)
    if local_stride not in (1, 2):
        raise UserError(f"local_stride={local_stride}: allowed are 2 (the paper's map sizes) and 1 (its table's print)")
    if len(repeats) != len(channels) or any(count < 0 for count in repeats):
        raise UserError(
            f"repeats={tuple(repeats)}, channels={tuple(channels)}: allowed is one number from 0 for each stage, as in "
            "repeats=7,10,7 with channels=128,256,384"
        )
    make_stage, make_local = BLOCKS[block]
    return HarmoniousNet(
        stem,
        channels,
        stage=lambda number, cin, cout: make_stage(cin, cout, repeats[number], conv_bias),
        local=lambda cin, cout: make_local(cin, cout, local_stride, conv_bias),
        bias=conv_bias,
        shared_local=shared_local,
    )


def robust_reid_1x(
    stem: int = 32,
    channels: tuple[int, ...] = (128, 256, 384),
    repeats: tuple[int, ...] = (7, 10, 7),
    block: str = "shuffle",
    conv_bias: bool = True,
    local_stride: int = 2,
    shared_local: bool = True,
) -> HarmoniousNet:
    """Table 1's 1x, 2.93 M parameters with its two layers of 512; images of 160 x 64."""
    return robust_reid(stem, channels, repeats, block, conv_bias, local_stride, shared_local)


def robust_reid_2x(
    stem: int = 36,
    channels: tuple[int, ...] = (240, 320, 480),
    repeats: tuple[int, ...] = (8, 11, 8),
    block: str = "shuffle",
    conv_bias: bool = True,
    local_stride: int = 2,
    shared_local: bool = True,
) -> HarmoniousNet:
    """Table 1's 2x ("deeper and wider"), 5.79 M parameters with its two layers of 960; images of 160 x 64."""
    return robust_reid(stem, channels, repeats, block, conv_bias, local_stride, shared_local)


# the options of the paper's heads, heads.StreamsHead
HEAD_1X: dict[str, Any] = {"head": "streams", "pooling": "gem-channel", "embedding_dim": 512, "neck": "l2"}
HEAD_2X: dict[str, Any] = {"head": "streams", "pooling": "gem-channel", "embedding_dim": 960, "neck": "l2"}

# The model side of table 2: backbone and head options. Columns d (hinge for soft margin), g (f with SWAG) and full (h with
# SWAG) differ from others in training alone. Without repeats the inception blocks stand as in HA-CNN, one A and one B a
# stage: "the Shuffle-A blocks can be used in a repeated sequence and still maintain the same number of parameters as the
# original inception block".
INCEPTION_2X = partial(robust_reid_2x, block="inception", repeats=(0, 0, 0))
ABLATIONS: dict[str, tuple[Callable[..., HarmoniousNet], dict[str, Any]]] = {
    "robust-reid-a": (ha_cnn, HA_CNN_HEAD),
    "robust-reid-b": (robust_reid_2x, {**HEAD_2X, "neck": "l2-test"}),  # as HA-CNN, for the distances alone
    "robust-reid-c": (INCEPTION_2X, HEAD_2X),
    "robust-reid-d": (robust_reid_2x, HEAD_2X),
    "robust-reid-e": (robust_reid_2x, {**HEAD_2X, "pooling": "average"}),
    "robust-reid-f": (robust_reid_1x, HEAD_1X),
    "robust-reid-g": (robust_reid_1x, HEAD_1X),
    "robust-reid-h": (robust_reid_2x, HEAD_2X),
    "robust-reid-full": (robust_reid_2x, HEAD_2X),
}

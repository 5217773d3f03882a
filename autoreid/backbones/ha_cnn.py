"""HA-CNN (Li, Zhu and Gong, "Harmonious Attention Network for Person Re-Identification", CVPR 2018).

A global stream of inception blocks, weighed by *soft* attention after every stage, and a local stream that follows four
regions, found by *hard* attention, through one block a stage. :class:`HarmoniousNet` is both streams around any block;
Robust-ReID (robust_reid.py) fills it with others.

The paper gives the stages, widths and attention; torchreid's reproduction (KaiyangZhou/deep-person-reid) the rest:
biased convolutions, what the inception blocks hold, the fixed scale of a region, and tanh also over the starting bias
(so the regions start centred at -.64, -.24, .24, .64 of the height, overlapping, and not at -.75 ... .75).

Where ours differs from torchreid's:
- any input size: a region is 24/80 of its map's height and 28/32 of its width (torchreid: 160 x 64 alone);
- a region is sampled at its own size at once, not at the map's and then resized;
- the regions share the batch norm's statistics as they share its weights: one batch of 4B, not four of B in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.errors import UserError

REGIONS = 4
REGION_SCALE = (1.0, 1 / REGIONS)  # of a region's width and height beside the map's; never learnt, as in the paper

# the options of the paper's head, heads.StreamsHead
HEAD: dict[str, Any] = {"head": "streams", "pooling": "average", "embedding_dim": 512, "neck": "l2-test"}


class ConvBNReLU(nn.Sequential):
    """Convolution, batch norm, ReLU; padded so that stride 1 keeps the size."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=bias),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class InceptionA(nn.Module):
    """Three 1 x 1 - 3 x 3 branches and a pooled one, a quarter of the channels each. Keeps the map's size."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__()
        part = channels_out // 4
        self.branches = nn.ModuleList(
            nn.Sequential(ConvBNReLU(channels_in, part, 1, bias=bias), ConvBNReLU(part, part, 3, bias=bias))
            for _ in range(3)
        )
        self.branches.append(nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvBNReLU(channels_in, part, 1, bias=bias)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class InceptionB(nn.Module):
    """Branches of one and of two 3 x 3 (a quarter of the channels each) and a max-pooled one (half), all strided."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 2, bias: bool = True) -> None:
        super().__init__()
        part = channels_out // 4
        self.branches = nn.ModuleList([
            nn.Sequential(ConvBNReLU(channels_in, part, 1, bias=bias), ConvBNReLU(part, part, 3, stride, bias)),
            nn.Sequential(
                ConvBNReLU(channels_in, part, 1, bias=bias),
                ConvBNReLU(part, part, 3, bias=bias),
                ConvBNReLU(part, part, 3, stride, bias),
            ),
            nn.Sequential(nn.MaxPool2d(3, stride, 1), ConvBNReLU(channels_in, 2 * part, 1, bias=bias)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SoftAttention(nn.Module):
    """A weight for every place and channel: B x C x H x W -> B x C x H x W in [0.5, 1) (a sigmoid behind a ReLU).

    A spatial map times a channel vector, as a full C x H x W attention would have too many parameters (section 3.1).
    """

    def __init__(self, channels: int, bias: bool = True, reduction: int = 16) -> None:
        super().__init__()
        narrow = max(channels // reduction, 1)
        self.spatial_conv = ConvBNReLU(1, 1, 3, 2, bias)
        self.spatial_scale = ConvBNReLU(1, 1, 1, bias=bias)
        self.channel = nn.Sequential(
            ConvBNReLU(channels, narrow, 1, bias=bias), ConvBNReLU(narrow, channels, 1, bias=bias)
        )
        self.mix = ConvBNReLU(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.spatial_conv(x.mean(dim=1, keepdim=True))  # B x 1 x H/2 x W/2
        spatial = F.interpolate(spatial, x.shape[2:], mode="bilinear", align_corners=True)
        channel = self.channel(x.mean(dim=(2, 3), keepdim=True))  # B x C x 1 x 1
        return torch.sigmoid(self.mix(self.spatial_scale(spatial) * channel))


class HardAttention(nn.Module):
    """Where to look: B x C x H x W -> B x 4 x 2, the regions' centres (x, y), -1 and 1 the map's outermost pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.centres = nn.Linear(channels, REGIONS * 2)
        # the same four stripes of the height for every image, until training says otherwise
        nn.init.zeros_(self.centres.weight)
        heights = [(2 * region + 1) / REGIONS - 1 for region in range(REGIONS)]  # -.75, -.25, .25, .75
        with torch.no_grad():
            self.centres.bias.copy_(torch.tensor([value for height in heights for value in (0.0, height)]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.centres(x.mean(dim=(2, 3)))).unflatten(1, (REGIONS, 2))


def sample_regions(x: Tensor, centres: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut regions out of the maps, bilinear, zeros outside: B x C x H x W and B x R x 2 -> B x R x C x h x w.

    A spatial transformer (Jaderberg et al. 2015) that may only move: the gradient reaches the centres. A region's
    outermost samples lie on its border (``align_corners``), as torch had it in 2018.
    """
    height, width = size
    # float32 at least: half precision would place a sample to a tenth of a pixel only
    dtype = torch.promote_types(centres.dtype, torch.float32)
    rows, columns = (
        torch.arange(1 - n, n, 2, device=x.device, dtype=dtype) / max(n - 1, 1) for n in (height, width)
    )  # -1 ... 1, or 0 for a single sample
    across = centres[:, :, 0, None, None] + REGION_SCALE[0] * columns  # B x R x 1 x w
    down = centres[:, :, 1, None, None] + REGION_SCALE[1] * rows[:, None]  # B x R x h x 1
    grid = torch.stack(torch.broadcast_tensors(across, down), dim=-1)  # B x R x h x w x 2
    # the regions one below the other in one grid, so that the maps need not be repeated
    sampled = F.grid_sample(x.to(grid.dtype), grid.flatten(1, 2), align_corners=True)  # B x C x R h x w
    return sampled.to(x.dtype).unflatten(2, (centres.shape[1], height)).transpose(1, 2)


class EachRegion(nn.ModuleList):
    """One shared block over all regions at once, or one block each: B x 4 x C x h x w -> B x 4 x C' x h' x w'."""

    def forward(self, regions: Tensor) -> Tensor:
        if len(self) == 1:
            return self[0](regions.flatten(0, 1)).unflatten(0, regions.shape[:2])
        return torch.stack([block(region) for block, region in zip(self, regions.unbind(1))], dim=1)


class HarmoniousNet(nn.Module):
    """Both streams. B x 3 x H x W -> B x channels x H/16 x W/16 with three stages (every stage halves, as the stem does).

    ``stage(number, channels_in, channels_out)`` makes a global stage, which halves its map, and
    ``local(channels_in, channels_out)`` a local block. ``shared_local=False`` gives every region blocks of its own.
    """

    regions = REGIONS

    def __init__(
        self,
        stem: int,
        channels: Sequence[int],
        stage: Callable[[int, int, int], nn.Module],
        local: Callable[[int, int], nn.Module],
        bias: bool = True,
        shared_local: bool = True,
    ) -> None:
        super().__init__()
        if stem < 1 or not channels or any(width < 4 or width % 4 for width in channels):
            raise UserError(
                f"stem={stem}, channels={tuple(channels)}: allowed are a stem from 1 and multiples of 4, one a stage, "
                "as in stem=32, channels=128,256,384"
            )
        steps = list(zip([stem, *channels], channels, strict=False))
        self.stem = ConvBNReLU(3, stem, 3, 2, bias)
        self.layers = nn.ModuleList(stage(number, *step) for number, step in enumerate(steps))
        self.soft = nn.ModuleList(SoftAttention(width, bias) for width in channels)
        self.hard = nn.ModuleList(HardAttention(width) for width in channels)
        self.local = nn.ModuleList(
            EachRegion(local(*step) for _ in range(1 if shared_local else REGIONS)) for step in steps
        )
        self.stage_channels = tuple(channels)
        self.channels = channels[-1]

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The global stream's map after every stage, under soft attention, the last one last."""
        x = self.stem(images)
        for layer, soft in zip(self.layers, self.soft):
            y = layer(x)
            x = y * soft(y)
            yield x

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map

    def streams(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last global map, B x C x h x w, and the four regions' last local maps, B x 4 x C x h' x w'."""
        x = self.stem(images)
        local: Tensor | None = None
        for layer, soft, hard, blocks in zip(self.layers, self.soft, self.hard, self.local):
            y = layer(x)
            # what a stage has seen says where to look in its input
            height, width = map(int, x.shape[2:])
            size = max(round(height * 24 / 80), 1), max(round(width * 28 / 32), 1)
            regions = sample_regions(x, hard(y), size)
            local = blocks(regions if local is None else regions + resized(local, size))
            x = y * soft(y)
        assert local is not None  # there is at least one stage
        return x, local


def resized(local: Tensor, size: tuple[int, int]) -> Tensor:
    """The local maps in the next stage's size: already so at 160 x 64 and stride 2, a pixel off at odd sizes."""
    if local.shape[3:] == size:
        return local
    return F.interpolate(local.flatten(0, 1), size, mode="bilinear").unflatten(0, local.shape[:2])


def inception_stage(channels_in: int, channels_out: int, repeats: int, bias: bool) -> nn.Module:
    """Inception-A ``1 + repeats`` times, then Inception-B, which halves the map; the paper's has no repeats."""
    return nn.Sequential(
        InceptionA(channels_in, channels_out, bias),
        *(InceptionA(channels_out, channels_out, bias) for _ in range(repeats)),
        InceptionB(channels_out, channels_out, 2, bias),
    )


def ha_cnn(stem: int = 32, channels: tuple[int, ...] = (128, 256, 384), conv_bias: bool = True) -> HarmoniousNet:
    """HA-CNN for images of 160 x 64; with two fully connected layers of 512 it has 2.93 M parameters, 0.54 GMAC."""
    return HarmoniousNet(
        stem,
        channels,
        stage=lambda number, cin, cout: inception_stage(cin, cout, 0, conv_bias),
        local=lambda cin, cout: InceptionB(cin, cout, 2, conv_bias),
        bias=conv_bias,
    )

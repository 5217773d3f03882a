"""ShuffleNetV2+ Small, Medium and Large: the ShuffleNetV2 block (Ma et al., "ShuffleNet V2: Practical Guidelines for
Efficient CNN Architecture Design", ECCV 2018) with Hard-Swish, Hard-Sigmoid and squeeze-and-excitation, after the code
its authors published without a paper of its own (github.com/megvii-model/ShuffleNet-Series, folder ShuffleNetV2+).

From that code: the block of each place (``KERNELS``, the same for the three sizes), the channels, ReLU in the first
stage and Hard-Swish after it, squeeze-and-excitation in the last two stages, and the tail. Ma et al. shuffle the
channels at the end of a block; here a block of stride 1 begins with it: its even channels pass, its odd ones are worked on.

The published tail stands between pooling and classifier: squeeze-and-excitation (LastSE) and a fully connected layer of
1280, both on the pooled vector. As part of the backbone, on a 1 x 1 map, it is countable and usable under any head, and
average pooling over its output changes nothing; ``tail="published"`` asks for it. The default "none" leaves the map of
the last convolution, which a re-ID head pools itself (SAFR drops LastSE, and dense layers, for that reason). The
published dropout of 0.2 and classifier (1280 to 1000, no bias) are the head's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.errors import unknown

XCEPTION = 0
KERNELS = (  # of every block, stage by stage: the kernel of a shuffle block, or an Xception block
    (3, 3, XCEPTION, 5),
    (5, 5, 3, 3),
    (7, 3, 7, 5, 5, 3, 7, 3),
    (7, 5, XCEPTION, 7),
)
STEM, LAST = 16, 1280  # channels of the first and of the last convolution


def pointwise(channels_in: int, channels_out: int, activation: type[nn.Module]) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), activation()]


def depthwise(channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


class SqueezeExcite(nn.Module):
    """A weight from 0 to 1 per channel, read off the averaged map (Hu et al. 2018); a quarter of the channels within."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels // 4)
        self.expand = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.relu(self.norm(self.reduce(x.mean(dim=(2, 3), keepdim=True))))  # B x C / 4 x 1 x 1
        return x * F.hardsigmoid(self.expand(squeezed))


class ShuffleBlock(nn.Module):
    """B x Cin x H x W -> B x Cout x H / stride x W / stride: what passes beside what the main branch makes.

    Stride 1 (Cin = Cout): half of the channels pass as they are. Stride 2: all of them are worked on by the main branch,
    and all pass through a depthwise and a 1 x 1 convolution. An Xception block, which never opens a stage and so has
    stride 1, has three depthwise separable convolutions for its main branch.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, activation: type[nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        taken = channels_in // 2 if stride == 1 else channels_in
        inner, made = channels_out // 2, channels_out - taken
        if kernel == XCEPTION:
            main = [
                *depthwise(taken, 3), *pointwise(taken, inner, activation),
                *depthwise(inner, 3), *pointwise(inner, inner, activation),
                *depthwise(inner, 3), *pointwise(inner, made, activation),
            ]
        else:
            main = [
                *pointwise(taken, inner, activation),
                *depthwise(inner, kernel, stride), *pointwise(inner, made, activation),
            ]
        self.main = nn.Sequential(*main, *([SqueezeExcite(made)] if squeeze else []))
        self.projection = None
        if stride == 2:
            self.projection = nn.Sequential(
                *depthwise(taken, kernel, stride), *pointwise(taken, taken, activation)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.projection is None:
            return torch.cat([x[:, 0::2], self.main(x[:, 1::2])], dim=1)
        return torch.cat([self.projection(x), self.main(x)], dim=1)


TAILS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    # the fully connected layer is a 1 x 1 convolution, as the vector is a 1 x 1 map here
    "published": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), SqueezeExcite(LAST), nn.Conv2d(LAST, LAST, 1, bias=False), nn.Hardswish()
    ),
}


class ShuffleNetV2Plus(nn.Module):
    """B x 3 x H x W -> B x 1280 x H / 32 x W / 32 (B x 1280 x 1 x 1 with ``tail="published"``).

    ``channels`` are those of the four stages' blocks; the fourth stage's map is the one after the last convolution.
    """

    def __init__(self, channels: Sequence[int], tail: str) -> None:
        super().__init__()
        if tail not in TAILS:
            raise unknown("tail", tail, TAILS)
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 3, 2, 1, bias=False), nn.BatchNorm2d(STEM), nn.Hardswish())
        before, stages = STEM, []
        for stage, (kernels, width) in enumerate(zip(KERNELS, channels, strict=True)):
            activation, squeeze, row = nn.ReLU if stage == 0 else nn.Hardswish, stage >= 2, []
            for position, kernel in enumerate(kernels):
                stride = 2 if position == 0 else 1
                row.append(ShuffleBlock(before, width, kernel, stride, activation, squeeze))
                before = width
            stages.append(nn.Sequential(*row))
        self.layers = nn.ModuleList(stages)
        self.conv_last = nn.Sequential(*pointwise(before, LAST, nn.Hardswish))
        self.tail = TAILS[tail]()
        self.stage_channels = (*channels[:-1], LAST)
        self.channels = LAST
        for name, module in self.named_modules():  # as published: one over the inputs of a group, and small where it gates
            if isinstance(module, nn.Conv2d):
                small = name.startswith(("stem.", "tail.")) or name.endswith((".reduce", ".expand"))
                nn.init.normal_(module.weight, std=0.01 if small else 1 / module.weight.shape[1])

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The map after every stage, the last one last; a caller that stops reading stops the computation."""
        *early, last = self.layers
        x = self.stem(images)
        for layer in early:
            x = layer(x)
            yield x
        yield self.tail(self.conv_last(last(x)))

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map


def shufflenet_v2_plus_small(tail: str = "none") -> ShuffleNetV2Plus:
    return ShuffleNetV2Plus((36, 104, 208, 416), tail)


def shufflenet_v2_plus_medium(tail: str = "none") -> ShuffleNetV2Plus:
    return ShuffleNetV2Plus((48, 128, 256, 512), tail)


def shufflenet_v2_plus_large(tail: str = "none") -> ShuffleNetV2Plus:
    return ShuffleNetV2Plus((68, 168, 336, 672), tail)

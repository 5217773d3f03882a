"""SAFR (Suprem, Pu and Ferreira, "Small, Accurate, and Fast Vehicle Re-ID on the Edge: the SAFR Approach", 2020, arXiv
2001.08895): a ResNet or a ShuffleNetV2+ with *global attention* on its first convolution, *local attention* on blocks.

[P] is the paper, [A] what its authors published (asuprem/EdnaML). Where they are silent or contradict themselves the
counts decide; here they are of the backbone and a LayerNorm neck, weight and bias ([A] freezes the bias), at 224 x 224.

- Global attention: x * sigmoid(conv(leaky_relu(conv(x)))), two 3 x 3 convolutions, no pooling ([P] 4.1), between the
  first convolution and its batch norm ([A]).
- ``mask``: "ste" is [P]'s (Eq. 1, see :class:`DBAM`): binary, learned, a logit per channel. "soft" is [A]'s, made from
  the input by pooling it, although [P] says "no pooling".
- ``dbam_site``: "mid", on a residual block's inner map, the one reading of Large that comes to [P]'s 30 M; "out", on its
  output, as [A], which yet makes FL from the branch before the addition: here FL is made from FG, as Eq. 1 has it, and a
  channel whose mask is 1 keeps its shortcut.
- ``dbam_where``: "first" block for Medium and Small ([P] 4.3). Large: [P] says "at all ResNet bottlenecks", and 46.2 M
  come of that at the inner width; the first block of each stage gives 29.85 M, [P]'s 30.
- ``attention_conv``: "dense" for Large, whose 30 M need it (5.94 GMAC; [P] says 4.5). "depthwise" for the others, as
  [P]'s "spatial attention for each kernel" and its GMAC for Small, 1.8 (1.83; 2.97 dense), Medium, 3.8 (3.68; 4.82), and
  Micro, 0.13 (0.16; 0.29): one dense pair on the first map costs 0.92.
- ``last_stride``: 2, as [P]'s 4 GMAC of its ResNet-50 need; [A] has 1.
- Baseline: a ResNet-50 and LayerNorm, 23.51 M; [P]'s 26 M count the ImageNet classifier, which it says it removes.
- Micro: ShuffleNetV2+ Small, the one near [P]'s 1.5 M (1.40), without LastSE, dense layer and dropout; local attention
  after the first block and an Xception block after that ([P] 4.3). ``projection="after"`` does the last convolution on
  the pooled map: the one way to [P]'s 0.13 GMAC with these parameters (0.131, attention left out), but in no text, so
  the default is "before".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from autoreid.backbones import resnet
from autoreid.backbones.resnet import ResNet
from autoreid.backbones.shufflenet_v2_plus import STEM, XCEPTION, ShuffleBlock, ShuffleNetV2Plus, shufflenet_v2_plus_small
from autoreid.errors import unknown

IMAGENET = {  # torchvision's weights, by our models' names; what they lack is ``SAFR.not_pretrained``
    "safr_baseline": resnet.IMAGENET["resnet50"],
    "safr_large": resnet.IMAGENET["resnet50"],
    "safr_medium": resnet.IMAGENET["resnet34"],
    "safr_small": resnet.IMAGENET["resnet18"],
}
GROUPS: dict[str, Callable[[int], int]] = {"dense": lambda channels: 1, "depthwise": lambda channels: channels}
SITES = ("mid", "out")
WHERE: dict[str, Callable[[int, int], bool]] = {  # of a stage and of a block's position in it
    "first": lambda stage, position: stage == position == 0,
    "first_of_stage": lambda stage, position: position == 0,
    "all": lambda stage, position: True,
}
PROJECTIONS = ("before", "after")


def require_known(**options: tuple[str, Collection[str]]) -> None:
    for name, (value, known) in options.items():
        if value not in known:
            raise unknown(name, value, known)


# ---------------------------------------------------------------------------------------- the two attentions
class GlobalAttention(nn.Module):
    """A weight from 0 to 1 for every channel and place. B x K x H x W -> the same."""

    def __init__(self, channels: int, attention_conv: str) -> None:
        super().__init__()
        groups = GROUPS[attention_conv](channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(F.leaky_relu(self.conv1(x))).sigmoid()


class BinaryMask(nn.Module):
    """K channels of 0 or 1, learned: 1 where a channel's logit is 0 or more; the gradient is the sigmoid's, passed straight
    through. Logits start at 0, so that every channel begins local: the gradient then reaches the attention, through it
    what comes before, and the logits. From a mask of 0 the attention would get none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        soft = self.logits.sigmoid()
        return (self.logits >= 0).to(soft.dtype) + (soft - soft.detach())  # the bracket is exactly 0


class SoftMask(nn.Module):
    """CBAM's channel attention (Woo et al. 2018), as [A]: sigmoid(MLP(mean) + MLP(max)), a sixteenth within.
    B x K x H x W -> B x K x 1 x 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=False)
        # FL is not negative, so that a hidden unit may begin dead, and in a narrow layer all; from positive weights none is
        nn.init.uniform_(self.reduce.weight, 0, channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return (self.expand(F.relu(self.reduce(mean))) + self.expand(F.relu(self.reduce(largest)))).sigmoid()


MASKS: dict[str, Callable[[int], nn.Module]] = {"ste": BinaryMask, "soft": SoftMask}


class DBAM(nn.Module):
    """Dense block attention ([P] Eq. 1): M * FL + (1 - M) * FG, with local features FL = relu(attention(FG)) of the
    global ones FG, and a mask M of the channels. B x K x H x W -> the same. The ReLU is [A]'s, and idle where FG comes out
    of one, as it does in every network here.
    """

    def __init__(self, channels: int, attention_conv: str, mask: str) -> None:
        super().__init__()
        self.attention = GlobalAttention(channels, attention_conv)
        self.mask = MASKS[mask](channels)

    def forward(self, x: Tensor) -> Tensor:
        local = F.relu(self.attention(x))
        mask = self.mask(local)
        return mask * local + (1 - mask) * x


def inserted(row: nn.Module, position: int, modules: Mapping[str, nn.Module]) -> nn.Sequential:
    """``row`` with named modules before that position; the others keep their names, and so their weights."""
    children = list(row.named_children())
    return nn.Sequential(OrderedDict([*children[:position], *modules.items(), *children[position:]]))


# ---------------------------------------------------------------------------------------- ResNet bodies
class AttendedBasicBlock(BasicBlock):
    """torchvision's block, with a place on its inner map and one on its output, empty until filled."""

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(channels, planes, stride, downsample)
        self.mid: nn.Module = nn.Identity()
        self.out: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(self.relu(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        return self.out(self.relu(y + (x if self.downsample is None else self.downsample(x))))


class AttendedBottleneck(Bottleneck):
    """torchvision's bottleneck, with a place after its 3 x 3 convolution and one on its output, empty until filled."""

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(channels, planes, stride, downsample)
        self.mid: nn.Module = nn.Identity()
        self.out: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.mid(self.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return self.out(self.relu(y + (x if self.downsample is None else self.downsample(x))))


class SAFR(ResNet):
    """A ResNet with attention in it; its other parameters keep a ResNet's names, so that a ResNet's weights fit.

    ``not_pretrained``: how the names of the parameters begin that a ResNet has not.
    """

    def __init__(
        self, block: type[AttendedBasicBlock] | type[AttendedBottleneck], blocks: Sequence[int], width: int,
        last_stride: int, global_attention: bool, local_attention: bool, attention_conv: str, dbam_site: str,
        dbam_where: str, mask: str,
    ) -> None:
        super().__init__(block, blocks, width, last_stride, stem=7)
        require_known(attention_conv=(attention_conv, GROUPS), mask=(mask, MASKS))
        require_known(dbam_site=(dbam_site, SITES), dbam_where=(dbam_where, WHERE))
        attended = []
        if global_attention:
            self.stem = inserted(self.stem, 1, {"global_attention": GlobalAttention(width, attention_conv)})
            attended.append("stem.global_attention.")
        for stage, row in enumerate(self.layers if local_attention else ()):
            channels = width * 2**stage * (block.expansion if dbam_site == "out" else 1)
            for position, residual in enumerate(row.children()):
                if WHERE[dbam_where](stage, position):
                    setattr(residual, dbam_site, DBAM(channels, attention_conv, mask))
                    attended.append(f"layers.{stage}.{position}.{dbam_site}.")
        self.not_pretrained = tuple(attended)


# every argument has a default of its own, because the command line reads a model's options off its signature
def safr_large(
    width: int = 64, last_stride: int = 2, global_attention: bool = True, local_attention: bool = True,
    attention_conv: str = "dense", dbam_site: str = "mid", dbam_where: str = "first_of_stage", mask: str = "ste",
) -> SAFR:
    return SAFR(AttendedBottleneck, (3, 4, 6, 3), width, last_stride, global_attention, local_attention, attention_conv,
                dbam_site, dbam_where, mask)


def safr_medium(
    width: int = 64, last_stride: int = 2, global_attention: bool = True, local_attention: bool = True,
    attention_conv: str = "depthwise", dbam_site: str = "mid", dbam_where: str = "first", mask: str = "ste",
) -> SAFR:
    return SAFR(AttendedBasicBlock, (3, 4, 6, 3), width, last_stride, global_attention, local_attention, attention_conv,
                dbam_site, dbam_where, mask)


def safr_small(
    width: int = 64, last_stride: int = 2, global_attention: bool = True, local_attention: bool = True,
    attention_conv: str = "depthwise", dbam_site: str = "mid", dbam_where: str = "first", mask: str = "ste",
) -> SAFR:
    return SAFR(AttendedBasicBlock, (2, 2, 2, 2), width, last_stride, global_attention, local_attention, attention_conv,
                dbam_site, dbam_where, mask)


def safr_baseline(width: int = 64, last_stride: int = 2) -> SAFR:
    return safr_large(width, last_stride, global_attention=False, local_attention=False)


def safr_micro(
    global_attention: bool = True, local_attention: bool = True, attention_conv: str = "depthwise", mask: str = "ste",
    xception: bool = True, projection: str = "before",
) -> ShuffleNetV2Plus:
    require_known(attention_conv=(attention_conv, GROUPS), mask=(mask, MASKS), projection=(projection, PROJECTIONS))
    net = shufflenet_v2_plus_small()
    width, extra = net.stage_channels[0], dict[str, nn.Module]()
    if global_attention:
        net.stem = inserted(net.stem, 1, {"global_attention": GlobalAttention(STEM, attention_conv)})
    if local_attention:
        extra["dbam"] = DBAM(width, attention_conv, mask)
    if xception:
        extra["xception"] = ShuffleBlock(width, width, XCEPTION, 1, nn.ReLU, squeeze=False)
    net.layers[0] = inserted(net.layers[0], 1, extra)  # behind the first block
    if projection == "after":
        net.conv_last = inserted(net.conv_last, 0, {"pool": nn.AdaptiveAvgPool2d(1)})
    return net


# ---------------------------------------------------------------------------------------- Fig. 5
_without = partial(safr_large, global_attention=False, local_attention=False)
# [P] 5.2: what each part adds to "ResNet-50 only", alone; "global and local attention with layer norm" together. The
# backbone's function and the options of the head.
ABLATIONS: dict[str, tuple[Callable[..., SAFR], dict[str, Any]]] = {
    "safr-fig5-baseline": (_without, {"neck": "none"}),
    "safr-fig5-batch-norm": (_without, {"neck": "batch"}),
    "safr-fig5-layer-norm": (_without, {"neck": "layer"}),
    "safr-fig5-global": (partial(safr_large, local_attention=False), {"neck": "none"}),
    "safr-fig5-local": (partial(safr_large, global_attention=False), {"neck": "none"}),
    "safr-fig5-all": (safr_large, {"neck": "layer"}),
}

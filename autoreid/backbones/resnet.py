"""ResNet (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), from torchvision's blocks.

``width`` scales every stage (64 is the paper's), so that a ResNet can be set beside a searched network of the same
size. ``last_stride=1`` keeps the last stage's map at a sixteenth of the picture (Sun et al. 2018, PCB). ``stem=7`` is
the paper's 7 x 7 convolution of stride 2 and pooling of stride 2; ``stem=3`` a 3 x 3 convolution of stride 2 alone,
for small pictures. A Bottleneck strides in its 3 x 3 convolution, as torchvision's (and its weights) do, and not in its
first 1 x 1 as the paper's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from autoreid.errors import UserError

IMAGENET = {  # torchvision's weights, by our models' names; V1, which the papers start from
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
}


class ResNet(nn.Module):
    """B x 3 x H x W -> B x channels x H / 32 x W / 32 (half of that with ``last_stride=1``, twice with ``stem=3``)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        width: int,
        last_stride: int,
        stem: int,
    ) -> None:
        super().__init__()
        if not 1 <= width <= 4096 or last_stride not in (1, 2) or stem not in (3, 7):
            raise UserError(
                f"resnet: width={width}, last_stride={last_stride}, stem={stem}; allowed: width 1 to 4096, "
                "last_stride 1 or 2, stem 3 or 7"
            )
        first = [nn.Conv2d(3, width, stem, 2, stem // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*first, *([nn.MaxPool2d(3, 2, 1)] if stem == 7 else []))
        channels, stages = width, []
        for stage, blocks in enumerate(layers):
            stride = 1 if stage == 0 else last_stride if stage == len(layers) - 1 else 2
            planes, row = width * 2**stage, []
            for position in range(blocks):
                row.append(_block(block, channels, planes, stride if position == 0 else 1))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*row))
        self.layers = nn.ModuleList(stages)
        self.stage_channels = tuple(width * 2**stage * block.expansion for stage in range(len(layers)))
        self.channels = self.stage_channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He initialisation, as the paper's
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The map after every stage, the last one last; a caller that stops reading stops the computation."""
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map

    def from_torchvision(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's tensors under our names, without its classifier."""
        ours = {"conv1": "stem.0", "bn1": "stem.1", **{f"layer{i + 1}": f"layers.{i}" for i in range(len(self.layers))}}
        parts = {name: name.split(".", 1) for name in state}
        return {
            ".".join([ours.get(first, first), *rest]): state[name]
            for name, (first, *rest) in parts.items() if first != "fc"
        }


def _block(block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, stride: int) -> nn.Module:
    out = planes * block.expansion
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    # a Bottleneck's inner width is planes itself at base_width 64, which is what every width here means
    return block(channels, planes, stride, downsample)


def resnet18(width: int = 64, last_stride: int = 2, stem: int = 7) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), width, last_stride, stem)


def resnet34(width: int = 64, last_stride: int = 2, stem: int = 7) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), width, last_stride, stem)


def resnet50(width: int = 64, last_stride: int = 2, stem: int = 7) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), width, last_stride, stem)

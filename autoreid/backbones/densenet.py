"""DenseNet-201 (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017), from torchvision's modules, tapped
as DaRe taps it (Wang et al., "Resource Aware Person Re-identification across Multiple Resolutions", CVPR 2018).

The paper says that a stage ends where the map halves; its authors' code (mileyan/DARENet) says where exactly: after a
dense block and *before* the transition, which would halve the channels too. A dense block ends in a concatenation of
raw sums, so each tap has a BatchNorm and a ReLU of its own; at the last one they are the network's own ``norm5``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from autoreid.errors import UserError

IMAGENET = {"densenet201": "DenseNet201_Weights.IMAGENET1K_V1"}  # torchvision's weights, by our models' names

SMALLEST = 32  # pixels a side: stem and transitions halve it five times


class DenseNet(nn.Module):
    """B x 3 x H x W -> B x channels x H / 32 x W / 32; ``blocks`` are the layers of the four dense blocks.

    ``features`` is torchvision's. ``taps=False`` leaves out the taps' norms: stages 1 to 3 are then the dense blocks'
    raw concatenations, for a network of one exit, in which the norms would be parameters that nothing trains.
    """

    not_pretrained = ("taps.",)

    def __init__(self, blocks: Sequence[int], growth: int, width: int, taps: bool) -> None:
        super().__init__()
        self.features = torchvision.models.DenseNet(growth, tuple(blocks), width).features
        channels, ends = width, []
        for layers in blocks:
            ends.append(channels + layers * growth)
            channels = ends[-1] // 2  # a transition halves them
        self.stage_channels = tuple(ends)
        self.channels = ends[-1]
        self.taps = nn.ModuleDict({
            f"denseblock{i}": nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True)) if taps else nn.Identity()
            for i, c in enumerate(ends[:-1], 1)
        })

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The four taps, the last one last; a caller that stops reading stops the computation."""
        if min(images.shape[-2:]) < SMALLEST:
            raise UserError(
                f"densenet: the picture is {images.shape[-2]} x {images.shape[-1]}; both sides must be {SMALLEST} pixels "
                "or more: give a larger input size"
            )
        x = images
        for name, module in self.features.named_children():
            x = module(x)
            if name in self.taps:
                yield self.taps[name](x)
        yield F.relu(x)  # of norm5

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map

    def from_torchvision(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's tensors under our names, without its classifier.

        Its files are older than its modules: they write ``denselayer1.norm.1`` for ``denselayer1.norm1``.
        """
        return {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", name): tensor
            for name, tensor in state.items() if not name.startswith("classifier.")
        }


def densenet201(taps: bool = True) -> DenseNet:
    return DenseNet((6, 12, 48, 32), growth=32, width=64, taps=taps)

"""ShuffleNetV2 (Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018),
from torchvision's modules: the four sizes of the paper's table 5, by the width of its stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torchvision
from torch import Tensor, nn

from autoreid.errors import UserError

IMAGENET = {  # torchvision's weights, by our models' names
    "shufflenet_v2_x0_5": "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1",
    "shufflenet_v2_x1_0": "ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1",
    "shufflenet_v2_x1_5": "ShuffleNet_V2_X1_5_Weights.IMAGENET1K_V1",
    "shufflenet_v2_x2_0": "ShuffleNet_V2_X2_0_Weights.IMAGENET1K_V1",
}

CHANNELS = {  # of conv1, stage 2, stage 3, stage 4 and conv5
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}


class ShuffleNetV2(nn.Module):
    """B x 3 x H x W -> B x channels x H / 32 x W / 32, in the paper's names: three stages, called 2, 3 and 4."""

    def __init__(self, repeats: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        net = torchvision.models.ShuffleNetV2(list(repeats), list(channels))
        self.conv1, self.maxpool = net.conv1, net.maxpool
        self.stage2, self.stage3, self.stage4 = net.stage2, net.stage3, net.stage4
        self.conv5 = net.conv5
        self.stage_channels = (channels[1], channels[2], channels[4])
        self.channels = channels[4]

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The maps at an eighth, a sixteenth and a 32nd of the picture, the last one after ``conv5``; a caller that
        stops reading stops the computation.
        """
        x = self.stage2(self.maxpool(self.conv1(images)))
        yield x
        x = self.stage3(x)
        yield x
        yield self.conv5(self.stage4(x))

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map

    def from_torchvision(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's tensors, whose names are ours, without its classifier."""
        return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def shufflenet_v2(width: float = 1.0) -> ShuffleNetV2:
    if width not in CHANNELS:
        raise UserError(f"shufflenet_v2: width={width}; allowed: {', '.join(map(str, CHANNELS))}")
    return ShuffleNetV2((4, 8, 4), CHANNELS[width])


# the names under which they are known; no option, as the width is in the name
def shufflenet_v2_x0_5() -> ShuffleNetV2:
    return shufflenet_v2(0.5)


def shufflenet_v2_x1_0() -> ShuffleNetV2:
    return shufflenet_v2(1.0)


def shufflenet_v2_x1_5() -> ShuffleNetV2:
    return shufflenet_v2(1.5)


def shufflenet_v2_x2_0() -> ShuffleNetV2:
    return shufflenet_v2(2.0)

"""OSNet (Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", ICCV 2019).

From the paper: layers, channels and strides (Table 1, which names them conv1 to conv5); the Lite 3 x 3, pointwise
before depthwise (3.1, "Depthwise Separable Convolutions"); the bottleneck of four streams, and the aggregation gate
that the streams share, its hidden layer a sixteenth as wide (3.2, "Omni-Scale Residual Block", Fig. 4b). From the
authors' code (KaiyangZhou/deep-person-reid): no batch norm within a Lite 3 x 3, the gate's biases, the projection on
the shortcut where the channels change, the widths' channels, the initialisation, the instance norms of OSNet-IBN.

Table 1 ends in a fully connected layer of 512 units, at every width the same: ``embedding_dim=512, fc="norm-relu"`` of
the head. With it x1.0 has 2,169,508 parameters and 978,875,392 MACs at 256 x 128. The authors' 2,193,616 (2.2 M) counts
a gate's parameters once per stream, their 978,878,352 (978.9 M) also the bias additions of the gates and that layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor, nn

from autoreid.errors import UserError

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SMALLEST = 13  # pixels: what conv1, its pooling and the two transitions leave one place of


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]


def _lite(channels: int) -> nn.Sequential:
    """Lite 3 x 3: pointwise first, nothing between the two; the other way round than in MobileNet."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _gate(channels: int) -> nn.Sequential:
    """B x C x h x w -> B x C x 1 x 1, a weight for each channel in (0, 1)."""
    hidden = channels // 16
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 1), nn.Sigmoid(),
    )  # fmt: skip


class OmniScaleBlock(nn.Module):
    """Four streams whose receptive fields are 3, 5, 7 and 9, added up by one gate, in a residual bottleneck.

    B x channels x h x w -> B x out x h x w; the streams work on a quarter of ``out``.
    """

    def __init__(self, channels: int, out: int, instance_norm: bool = False) -> None:
        super().__init__()
        middle = out // 4
        self.reduce = nn.Sequential(*_conv(channels, middle, 1), nn.ReLU(inplace=True))
        self.streams = nn.ModuleList(nn.Sequential(*(_lite(middle) for _ in range(depth))) for depth in (1, 2, 3, 4))
        self.gate = _gate(middle)
        self.restore = nn.Sequential(*_conv(middle, out, 1))
        self.shortcut = nn.Identity() if channels == out else nn.Sequential(*_conv(channels, out, 1))
        self.norm = nn.InstanceNorm2d(out, affine=True) if instance_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        scales = (stream(reduced) for stream in self.streams)
        first, *others = (self.gate(scale) * scale for scale in scales)
        mixed = sum(others, first)
        return self.relu(self.norm(self.restore(mixed) + self.shortcut(x)))


class OSNet(nn.Module):
    """B x 3 x H x W -> B x 512 * width x H / 16 x W / 16.

    The four stages are conv2 to conv5. A transition, which halves the map, opens the stage after it: whoever stops
    reading ``stages`` has not paid for it.
    """

    def __init__(self, width: float, instance_norm: bool) -> None:
        super().__init__()
        if width not in WIDTHS:
            raise UserError(f"osnet: width={width}; allowed: {', '.join(map(str, WIDTHS))}")
        c1, c2, c3, c4 = (int(channels * width) for channels in (64, 256, 384, 512))
        convolution, norm = _conv(3, c1, 7, 2)
        self.stem = nn.Sequential(
            convolution, nn.InstanceNorm2d(c1, affine=True) if instance_norm else norm,
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.transitions = nn.ModuleList([nn.Identity(), _transition(c2), _transition(c3), nn.Identity()])
        self.layers = nn.ModuleList([
            nn.Sequential(OmniScaleBlock(c1, c2, instance_norm), OmniScaleBlock(c2, c2, instance_norm)),
            nn.Sequential(OmniScaleBlock(c2, c3), OmniScaleBlock(c3, c3)),
            nn.Sequential(OmniScaleBlock(c3, c4), OmniScaleBlock(c4, c4)),
            nn.Sequential(nn.Sequential(*_conv(c4, c4, 1), nn.ReLU(inplace=True))),
        ])  # fmt: skip
        self.channels, self.stage_channels = c4, (c2, c3, c4, c4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The map after conv2, conv3, conv4 and conv5: a fourth, an eighth, a sixteenth and a sixteenth of H x W."""
        height, width = images.shape[2:]
        if min(height, width) < SMALLEST:
            raise UserError(f"osnet: images of {height} x {width} pixels; allowed: {SMALLEST} or more a side")
        x = self.stem(images)
        for transition, layer in zip(self.transitions, self.layers, strict=True):
            x = layer(transition(x))
            yield x

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map


def _transition(channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv(channels, channels, 1), nn.ReLU(inplace=True), nn.AvgPool2d(2))


def osnet(width: float = 1.0, instance_norm: bool = False) -> OSNet:
    """``instance_norm`` makes it OSNet-IBN: instance norm in conv1 and behind the sums of conv2's blocks."""
    return OSNet(width, instance_norm)


def osnet_x1_0(instance_norm: bool = False) -> OSNet:
    return OSNet(1.0, instance_norm)


def osnet_x0_75(instance_norm: bool = False) -> OSNet:
    return OSNet(0.75, instance_norm)


def osnet_x0_5(instance_norm: bool = False) -> OSNet:
    return OSNet(0.5, instance_norm)


def osnet_x0_25(instance_norm: bool = False) -> OSNet:
    return OSNet(0.25, instance_norm)

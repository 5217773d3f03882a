"""The hand-designed backbones, by name: ``BACKBONES[name](**options)``; every option has a default.

A backbone has ``channels`` (of its last map), ``stages(images)`` (the map after every stage) and ``forward(images)``
(the last of them). To add one: a file here and a line below.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from autoreid.backbones import resnet

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
}

"""The hand-designed models, by name: ``BACKBONES[name](**options)``; every option has a default.

A backbone has ``stages(images)`` (a generator of the map after every stage: who stops reading stops the computation),
``forward(images)`` (the last of them), ``stage_channels`` and ``channels`` (of the last). To add one: a file here and a
line below; a line in ``OWN_HEADS`` where its paper's head is not ``heads.PooledHead`` with its defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autoreid.backbones import resnet

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "dare-r50": resnet.resnet50,
}

# The options of the head that belong to a model, by name.
OWN_HEADS: dict[str, Mapping[str, Any]] = {
    "dare-r50": {"head": "exits"},
}

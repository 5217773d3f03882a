"""The hand-designed models, by name: ``BACKBONES[name](**options)``; every option has a default.

A backbone has ``stages(images)`` (a generator of the map after every stage: who stops reading stops the computation),
``forward(images)`` (the last of them), ``stage_channels`` and ``channels`` (of the last). To add one: a file here and a
line below; a line in ``OWN_HEADS`` where its paper's head is not ``heads.PooledHead`` with its defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autoreid.backbones import (
    densenet,
    ha_cnn,
    osnet,
    resnet,
    robust_reid,
    safr,
    shufflenet_v2,
    shufflenet_v2_plus,
    vit,
)

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "densenet201": densenet.densenet201,
    "shufflenet-v2-x0.5": shufflenet_v2.shufflenet_v2_x0_5,
    "shufflenet-v2-x1.0": shufflenet_v2.shufflenet_v2_x1_0,
    "shufflenet-v2-x1.5": shufflenet_v2.shufflenet_v2_x1_5,
    "shufflenet-v2-x2.0": shufflenet_v2.shufflenet_v2_x2_0,
    "shufflenet-v2-plus-small": shufflenet_v2_plus.shufflenet_v2_plus_small,
    "shufflenet-v2-plus-medium": shufflenet_v2_plus.shufflenet_v2_plus_medium,
    "shufflenet-v2-plus-large": shufflenet_v2_plus.shufflenet_v2_plus_large,
    "vit-b16": vit.vit_b16,
    "osnet-x1.0": osnet.osnet_x1_0,
    "osnet-x0.75": osnet.osnet_x0_75,
    "osnet-x0.5": osnet.osnet_x0_5,
    "osnet-x0.25": osnet.osnet_x0_25,
    "safr-baseline": safr.safr_baseline,
    "safr-large": safr.safr_large,
    "safr-medium": safr.safr_medium,
    "safr-small": safr.safr_small,
    "safr-micro": safr.safr_micro,
    "ha-cnn": ha_cnn.ha_cnn,
    "robust-reid-1x": robust_reid.robust_reid_1x,
    "robust-reid-2x": robust_reid.robust_reid_2x,
    "dare-r50": resnet.resnet50,
    "dare-d201": densenet.densenet201,
}

# The options of the head that belong to a model, by name.
OWN_HEADS: dict[str, Mapping[str, Any]] = {
    **{f"safr-{size}": {"neck": "layer"} for size in ("baseline", "large", "medium", "small", "micro")},
    **{f"osnet-x{width}": {"embedding_dim": 512, "fc": "norm-relu", "neck": "none"}
       for width in ("1.0", "0.75", "0.5", "0.25")},
    "ha-cnn": ha_cnn.HEAD,
    "robust-reid-1x": robust_reid.HEAD_1X,
    "robust-reid-2x": robust_reid.HEAD_2X,
    "dare-r50": {"head": "exits"},
    "dare-d201": {"head": "exits"},
}

# The papers' ablations, a name each: SAFR's figure 5 and the columns of Robust-ReID's table 2.
ABLATIONS = {**safr.ABLATIONS, **robust_reid.ABLATIONS}
BACKBONES.update({name: build for name, (build, _) in ABLATIONS.items()})
OWN_HEADS.update({name: head for name, (_, head) in ABLATIONS.items()})

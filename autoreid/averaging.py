"""One net out of the weights that a training passed: an exponential moving average (EMA) or a plain mean (SWA).

SWA: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (UAI 2018), algorithm 1: the
mean over the ends of the last epochs; batch norms then need new statistics. EMA: Polyak and Juditsky (1992), as used
since Inception, with statistics averaged alike. torch's ``AveragedModel`` holds both. SWAG has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from autoreid.recipe import Recipe


def averaged(net: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The average that the recipe asks for, of no weights yet; None where it asks for none."""
    if recipe.ema > 0:
        return AveragedModel(net, multi_avg_fn=ema_rule(recipe.ema), use_buffers=True)
    return AveragedModel(net) if recipe.swa_epochs else None


def ema_rule(decay: float):
    """average <- d average + (1 - d) weights with d = min(decay, (1 + t) / (10 + t)) at update t.

    The beginning is shorter-sighted, or a training of a few hundred steps would keep its first weights (the schedule of
    TensorFlow's ExponentialMovingAverage).
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        t = float(updates)
        share = 1 - min(decay, (1 + t) / (10 + t))
        for mean, now in zip(average, weights, strict=True):
            if mean.is_floating_point():
                mean.lerp_(now.to(mean.dtype), share)
            else:
                mean.copy_(now)  # the counts of batches

    return update

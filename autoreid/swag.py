"""SWAG with a diagonal covariance: the Gaussian of the weights that a cyclic learning rate visits.

Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (NeurIPS 2019), section 3.2; as used by
Robust-ReID, sections 3.1 and 4.2: after the ordinary training, 15 cosine cycles of 35 epochs, the peak of each 0.7
times the one before, and the weights collected at the end of every cycle. The paper reports one network's size and
FLOPs, so what is deployed is read as the mean; samples serve for averaging predictions.

    swag = SWAG(net)
    for cycle in range(15):
        ...  # 35 epochs of training, the rate a cosine (Recipe.learning_rate)
        swag.collect(net)
    swag.mean_to(net)
    update_batch_norms(net, loader.epoch(0))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from autoreid.errors import UserError

LEAST_VARIANCE = 1e-30  # Maddox et al.'s code; a weight that never moved keeps a standard deviation above 0


class SWAG:
    """Mean and variance of every trainable parameter over the collected weights, float32 on the CPU.

    The second moment is kept as a sum of squared deviations from the running mean (Welford 1962), which gives the
    paper's E[w^2] - E[w]^2 without its cancellation: in float32 that difference is noise where a weight has moved by
    less than a thousandth of its size. ``state_dict`` and ``load_state_dict`` go on exactly where a run stopped.
    """

    def __init__(self, net: nn.Module) -> None:
        self.count = 0
        zeros = {name: torch.zeros(p.shape, device="cpu") for name, p in _trainable(net).items()}
        self.means = zeros
        self.deviations = {name: zero.clone() for name, zero in zeros.items()}

    @torch.no_grad()
    def collect(self, net: nn.Module) -> None:
        """Take the net's weights into the moments: at the end of every cycle."""
        parameters = self._same(net)
        self.count += 1
        for name, parameter in parameters.items():
            weights, mean = parameter.detach().to("cpu", torch.float32), self.means[name]
            change = weights - mean
            mean += change / self.count
            self.deviations[name] += change * (weights - mean)  # by the old and by the new mean

    def variance(self, name: str) -> Tensor:
        """The population variance of one parameter, as in the paper: divided by the number of collected weights."""
        return (self.deviations[name] / self.count).clamp(min=LEAST_VARIANCE)

    @torch.no_grad()
    def mean_to(self, net: nn.Module) -> None:
        """Give the net the mean weights; its batch norms then need :func:`update_batch_norms`."""
        for name, parameter in self._filled(net).items():
            parameter.copy_(self.means[name])

    @torch.no_grad()
    def sample_to(self, net: nn.Module, scale: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Give the net weights drawn from N(mean, scale x variance); its batch norms then need an update.

        Scale 1 is the diagonal posterior of the paper. Its 1/2 belongs to the other variant, where the diagonal and
        the low-rank part each give half of the variance. ``generator`` is one of the CPU: a seed draws the same
        weights for any device.
        """
        if not 0 <= scale < math.inf:
            raise UserError(f"scale={scale}: allowed is 0 or more; it multiplies the variance, and 1 is SWAG-Diagonal")
        for name, parameter in self._filled(net).items():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(self.means[name] + (scale * self.variance(name)).sqrt() * noise)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; the tensors are the live ones, as in torch."""
        return {"count": self.count, "means": self.means, "deviations": self.deviations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, own in (("means", self.means), ("deviations", self.deviations)):
            _require_same(_shapes(state[key]), _shapes(own), "the saved state")
        self.count = state["count"]
        self.means, self.deviations = ({k: v.clone() for k, v in state[key].items()} for key in ("means", "deviations"))

    def _same(self, net: nn.Module) -> dict[str, nn.Parameter]:
        parameters = _trainable(net)
        _require_same(_shapes(parameters), _shapes(self.means), "this net")
        return parameters

    def _filled(self, net: nn.Module) -> dict[str, nn.Parameter]:
        if self.count == 0:
            raise UserError("SWAG has collected no weights yet: train for at least one whole cycle")
        return self._same(net)


def _trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _require_same(given: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]], what: str) -> None:
    odd = sorted(name for name in given.keys() | own.keys() if given.get(name) != own.get(name))
    if odd:
        raise UserError(
            f"SWAG was made for another network: {what} has {odd[0]} {given.get(odd[0], 'not at all')}, collected is "
            f"{own.get(odd[0], 'none')} ({len(odd)} parameters differ); use the network that SWAG was made with"
        )


def update_batch_norms(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The running statistics of the net's batch norms anew: plain means over training batches (images, labels).

    New weights leave the old statistics wrong. torch's ``update_bn`` does it; what is added is the net's own device
    and a stop where there is no batch, which would leave the statistics at 0 and 1.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("update_batch_norms: there is no batch to take statistics from; give at least one")
    update_bn(itertools.chain([first], batches), net, next(net.parameters()).device)

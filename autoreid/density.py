"""Activation density (SAFR, Suprem et al. 2020, section 4.1, Fig. 3 and 4): how much of a network's maps is not zero.

"Activation density is calculated as fraction of non-zero activations in each layer. Each of L1-9 are residual groups
between ResNet skip connections in SAFR-Large." The paper's claim: global attention raises the density of the first
layer, and density falls with depth. The paper's own contradiction: SAFR-Large is a ResNet-50 of sixteen blocks, and
nine would be the stem and the blocks of a ResNet-18; here the stem and every block have a row of their own.

Two networks can be compared when both are trained, and on the same images: without training about half of what enters
a ReLU is negative, whatever the architecture. And only a ReLU makes exact zeros: the maps of a transformer, of
hard-swish or of a cell that ends in batch norms are dense by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoreid.errors import UserError


@dataclass(frozen=True)
class Density:
    """``nonzero`` of the ``elements`` that ``group`` gave for all images together."""

    group: str  # "stem", or "stage2.1": the first group of the second stage; or "stage2": all of it
    nonzero: int
    elements: int

    @property
    def density(self) -> float:
        """From 0 to 1."""
        return self.nonzero / self.elements


def groups_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """The modules whose output is measured, by name, in the order of depth; no family is known here.

    A backbone may say so itself, with a method ``groups()`` that gives such a dict. Otherwise they are the stem, if there
    is one called ``stem``, and the blocks of ``layers``, if that is a list of sequential stages: what lies between two
    skip connections of a ResNet. Where a backbone has neither, :func:`activation_density` takes its stages.
    """
    own = getattr(backbone, "groups", None)
    if callable(own):
        return dict(own())
    groups: dict[str, nn.Module] = {}
    stem, layers = getattr(backbone, "stem", None), getattr(backbone, "layers", None)
    if isinstance(stem, nn.Module):
        groups["stem"] = _before_pooling(stem)
    if isinstance(layers, nn.ModuleList) and all(isinstance(layer, nn.Sequential) for layer in layers):
        groups |= {
            f"stage{i}.{j}": block for i, layer in enumerate(layers, 1) for j, block in enumerate(layer.children(), 1)
        }
    return groups


def _before_pooling(stem: nn.Module) -> nn.Module:
    """The stem's last module that does not pool: a maximum over 3 x 3 places hides zeros that the layer made."""
    rest = list(stem.children()) if isinstance(stem, nn.Sequential) else []
    while rest and isinstance(rest[-1], (nn.MaxPool2d, nn.AvgPool2d)):
        rest.pop()
    return rest[-1] if rest else stem


def activation_density(net: nn.Module, batches: Iterable[Tensor]) -> list[Density]:
    """A row per residual group of a network or of its ``backbone``, over all images of ``batches``, in eval mode.

    A batch is B x 3 x H x W, normalised as in training, and is moved to the network's device:
    ``(normalise(load_images(samples[i : i + 64], size)) for i in range(0, len(samples), 64))``.
    Every element weighs the same, so that over images of one size a row is the mean of the images' densities. A module
    that runs more than once for an image counts each time. The modes of all modules stay as they were.
    """
    backbone: nn.Module = getattr(net, "backbone", net)
    groups = groups_of(backbone)
    by_stage = not set(groups) - {"stem"}
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    nonzero: dict[str, Tensor | int] = dict.fromkeys(groups, 0)
    elements = dict.fromkeys(groups, 0)

    def count(group: str, out: Tensor) -> None:
        nonzero[group] = nonzero.get(group, 0) + torch.count_nonzero(out)  # stays on the device: no waiting
        elements[group] = elements.get(group, 0) + out.numel()

    modes = [(module, module.training) for module in net.modules()]
    hooks = [
        module.register_forward_hook(lambda module, inputs, out, group=group: count(group, out))
        for group, module in groups.items()
    ]
    try:
        net.eval()
        with torch.inference_mode():
            for images in batches:
                for stage, out in enumerate(backbone.stages(images.to(device)), 1):  # type: ignore[operator]
                    if by_stage:
                        count(f"stage{stage}", out)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not any(elements.values()):
        raise UserError("activation density: there are no images to measure; give one or more")
    silent = [group for group, size in elements.items() if not size]
    if silent:  # a mistake in a backbone's groups(), not in what a user gave
        raise ValueError(f"groups that the stages never run: {', '.join(silent)}")
    return [Density(group, int(nonzero[group]), elements[group]) for group in elements]


def per_stage(rows: Sequence[Density]) -> list[Density]:
    """The rows added up: ``stage2.1`` and ``stage2.2`` to ``stage2``. Every element weighs the same."""
    sums: dict[str, Density] = {}
    for row in rows:
        stage = row.group.split(".")[0]
        before = sums.get(stage, Density(stage, 0, 0))
        sums[stage] = Density(stage, before.nonzero + row.nonzero, before.elements + row.elements)
    return list(sums.values())

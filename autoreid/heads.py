"""From a feature map to an embedding: pooling, an optional linear embedding, a neck; and the net that joins them.

The identity classifier belongs to training (train.py, search.py): a :class:`ReIDNet` is what gets deployed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.errors import UserError, unknown


class GeM(nn.Module):
    """Generalised mean: (mean x^p)^(1/p) over the map, p trainable (Radenovic et al. 2018). B x C x H x W -> B x C."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.tensor(p)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.eps).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class AveragePool(nn.Module):
    """B x C x H x W -> B x C."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class MaxPool(nn.Module):
    """B x C x H x W -> B x C."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


class L2Neck(nn.Module):
    """Vectors of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def batch_neck(dims: int) -> nn.Module:
    """BNNeck (Luo et al. 2019, "Bag of Tricks", section 3.5): batch norm whose shift stays zero."""
    neck = nn.BatchNorm1d(dims)
    neck.bias.requires_grad_(False)
    return neck


POOLINGS = {"average": AveragePool, "max": MaxPool, "gem": GeM}
NECKS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dims: nn.Identity(),
    "batch": batch_neck,
    "layer": nn.LayerNorm,
    "l2": lambda dims: L2Neck(),
}


class ReIDNet(nn.Module):
    """Backbone, pooling, optional linear embedding and neck.

    ``forward(images: B x 3 x H x W) -> B x dims`` in train and eval mode alike. Training also needs the vector before
    the neck: ``net.neck(net.features(images))`` is ``forward`` taken in two steps (the triplet reads the first, the
    classifier the second).

    ``input_size``, (H, W), is set on a net that was loaded from its weights: the size it was trained at.

    ``backbone`` maps images to B x C x h x w and says C as ``backbone.channels``.
    """

    input_size: tuple[int, int] | None = None

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "average",
        embedding_dim: int | None = None,
        neck: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        if neck not in NECKS:
            raise unknown("neck", neck, NECKS)
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}; allowed: from 0 to below 1")
        if embedding_dim is not None and embedding_dim < 1:
            raise UserError(f"embedding_dim is {embedding_dim}; allowed: 1 or more, or none")
        channels: int = backbone.channels  # type: ignore[assignment]
        self.dims = embedding_dim or channels
        self.backbone = backbone
        self.pooling = POOLINGS[pooling]()
        self.embedding = nn.Identity() if embedding_dim is None else nn.Linear(channels, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.neck = NECKS[neck](self.dims)

    def features(self, images: Tensor) -> Tensor:
        """B x 3 x H x W -> B x dims, before the neck."""
        return self.embedding(self.dropout(self.pooling(self.backbone(images))))

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.features(images))

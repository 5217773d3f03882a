"""From a backbone's maps to an embedding, and the net that joins the two.

Three heads: ``pooled`` reads the last map, ``exits`` the map of every stage (DaRe), ``streams`` a global map and those of
image regions (HA-CNN, Robust-ReID). The identity classifier belongs to training (train.py): a :class:`ReIDNet` is what
gets deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.errors import UserError, unknown


# ---------------------------------------------------------------------------------------- maps to vectors
class GeM(nn.Module):
    """Generalised mean: (mean x^p)^(1/p) over the map, p trainable (Radenovic et al. 2018). B x C x H x W -> B x C.

    One p for all channels, or with ``channels`` one for each (Robust-ReID, Eq. 6: p_k). Values below ``eps`` count as it.
    """

    def __init__(self, channels: int = 1, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.full((channels,), p)), eps

    def forward(self, x: Tensor) -> Tensor:
        powers = x.clamp(min=self.eps).pow(self.p[:, None, None])
        return powers.mean(dim=(2, 3)).pow(1 / self.p)


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


class L2TestNeck(L2Neck):
    """Vectors of length one for the distances only: both losses read them as they are (HA-CNN, section 3.4)."""


def batch_neck(dims: int) -> nn.Module:
    """BNNeck (Luo et al. 2019, "Bag of Tricks", section 3.5): batch norm whose shift stays zero."""
    neck = nn.BatchNorm1d(dims)
    neck.bias.requires_grad_(False)
    return neck


def norm_relu(inputs: int, dims: int) -> nn.Module:
    """The fully connected layer of HA-CNN and OSNet."""
    return nn.Sequential(nn.Linear(inputs, dims), nn.BatchNorm1d(dims), nn.ReLU())


POOLINGS: dict[str, Callable[[int], nn.Module]] = {
    "average": lambda channels: AveragePool(),
    "max": lambda channels: MaxPool(),
    "gem": lambda channels: GeM(),
    "gem-channel": GeM,
}
NECKS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dims: nn.Identity(),
    "batch": batch_neck,
    "layer": nn.LayerNorm,
    "l2": lambda dims: L2Neck(),
    "l2-test": lambda dims: L2TestNeck(),
}
FCS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "norm-relu": norm_relu}


class Branch(NamedTuple):
    """What training supervises: the vector that the metric loss reads, and the one that the classifier reads."""

    metric: Tensor
    classified: Tensor


def branch(features: Tensor, neck: nn.Module) -> Branch:
    """The neck stands between the two losses (Luo et al. 2019; SAFR, section 4.2), but L2 before both (Robust-ReID)."""
    if isinstance(neck, L2TestNeck):
        return Branch(features, features)
    after = neck(features)
    return Branch(after if isinstance(neck, L2Neck) else features, after)


# ---------------------------------------------------------------------------------------- heads
class PooledHead(nn.Module):
    """The last map: pooling, dropout, optional embedding layer, neck. One branch."""

    reads = "forward"

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "average",
        embedding_dim: int | None = None,
        fc: str = "linear",
        neck: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(pooling, neck, embedding_dim, dropout)
        if fc not in FCS:
            raise unknown("fc", fc, FCS)
        channels: int = backbone.channels  # type: ignore[assignment]
        self.dims = embedding_dim or channels
        self.branch_dims = (self.dims,)
        self.pooling = POOLINGS[pooling](channels)
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Identity() if embedding_dim is None else FCS[fc](channels, embedding_dim)
        self.neck = NECKS[neck](self.dims)

    def features(self, x: Tensor) -> Tensor:
        return self.embedding(self.dropout(self.pooling(x)))

    def branches(self, x: Tensor) -> list[Branch]:
        return [branch(self.features(x), self.neck)]

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.features(x))


class ExitsHead(nn.Module):
    """DaRe (Wang et al., CVPR 2018, section 3): an embedding after every stage and their learned sum.

    phi_s = fc(relu(bn(fc(pool(map_s))))), phi = sum_s w_s phi_s with w learned. The first fully connected layer has 1024
    units as in the authors' code; the paper's text prints 1204. Branches: every phi_s and phi (deep supervision).
    The embedding is phi, which is also what the last exit gives; an earlier exit gives its phi_s.
    """

    reads = "stages"

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int = 1024,
        embedding_dim: int = 128,
        pooling: str = "average",
        neck: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(pooling, neck, embedding_dim, dropout)
        if hidden < 1:
            raise UserError(f"hidden is {hidden}; allowed: 1 or more")
        widths: Sequence[int] = backbone.stage_channels  # type: ignore[assignment]
        self.dims = embedding_dim
        self.branch_dims = (embedding_dim,) * (len(widths) + 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                POOLINGS[pooling](channels), nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                nn.Dropout(dropout), nn.Linear(hidden, embedding_dim),
            )
            for channels in widths
        )
        # equal parts to begin with, so that phi has the scale of one phi_s
        self.fusion = nn.Parameter(torch.full((len(widths),), 1 / len(widths)))
        self.necks = nn.ModuleList(NECKS[neck](embedding_dim) for _ in self.branch_dims)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """phi_1 .. phi_S, phi, each B x dims, before the necks."""
        phis = [stage(x) for stage, x in zip(self.stages, maps, strict=True)]
        return [*phis, sum(w * phi for w, phi in zip(self.fusion, phis, strict=True))]

    def branches(self, maps: Sequence[Tensor]) -> list[Branch]:
        return [branch(phi, neck) for phi, neck in zip(self.features(maps), self.necks, strict=True)]

    def exits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What a query that leaves at exit s is compared by: phi_1 .. phi_{S-1}, phi, each B x dims."""
        after = [neck(phi) for phi, neck in zip(self.features(maps), self.necks, strict=True)]
        return [*after[:-2], after[-1]]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.necks[-1](self.features(maps)[-1])


class StreamsHead(nn.Module):
    """HA-CNN and Robust-ReID: a vector of the whole picture and one of its regions, side by side.

    Reads ``backbone.streams``: the global map B x C x h x w and the regions' maps B x R x C x h' x w'. Each stream is
    pooled and goes through Linear, batch norm and ReLU to ``embedding_dim``; the regions' vectors are joined before.
    Two branches; the embedding is B x (2 * embedding_dim), global first.
    """

    reads = "streams"

    def __init__(
        self, backbone: nn.Module, pooling: str = "gem-channel", embedding_dim: int = 512, neck: str = "l2"
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "streams"):
            raise UserError("the head 'streams' needs a backbone with image regions: ha-cnn or robust-reid; allowed for "
                            "this one: pooled, exits")
        _check(pooling, neck, embedding_dim, 0)
        channels: int = backbone.channels  # type: ignore[assignment]
        regions: int = backbone.regions  # type: ignore[assignment]
        self.dims = 2 * embedding_dim
        self.branch_dims = (embedding_dim, embedding_dim)
        self.pooling_global, self.pooling_local = POOLINGS[pooling](channels), POOLINGS[pooling](channels)
        self.fc_global, self.fc_local = norm_relu(channels, embedding_dim), norm_relu(regions * channels, embedding_dim)
        self.neck_global, self.neck_local = NECKS[neck](embedding_dim), NECKS[neck](embedding_dim)

    def features(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The global vector and the regions', each B x embedding_dim, before the necks."""
        whole, regions = maps
        pooled = self.pooling_local(regions.flatten(0, 1)).unflatten(0, regions.shape[:2])  # B x R x C
        return self.fc_global(self.pooling_global(whole)), self.fc_local(pooled.flatten(1))

    def branches(self, maps: tuple[Tensor, Tensor]) -> list[Branch]:
        g, regions = self.features(maps)
        return [branch(g, self.neck_global), branch(regions, self.neck_local)]

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        g, regions = self.features(maps)
        return torch.cat([self.neck_global(g), self.neck_local(regions)], dim=1)


HEADS: dict[str, Callable[..., nn.Module]] = {"pooled": PooledHead, "exits": ExitsHead, "streams": StreamsHead}


def _check(pooling: str, neck: str, embedding_dim: int | None, dropout: float) -> None:
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    if neck not in NECKS:
        raise unknown("neck", neck, NECKS)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}; allowed: from 0 to below 1")
    if embedding_dim is not None and embedding_dim < 1:
        raise UserError(f"embedding_dim is {embedding_dim}; allowed: 1 or more, or none")


# ---------------------------------------------------------------------------------------- the net
class ReIDNet(nn.Module):
    """A backbone and a head (``pooled``, ``exits`` or ``streams``, with its options).

    ``forward(images: B x 3 x H x W) -> B x dims`` in train and eval mode alike. Training reads :meth:`branches`.
    ``input_size``, (H, W), is set on a net that was loaded from its weights: the size it was trained at.
    """

    input_size: tuple[int, int] | None = None

    def __init__(self, backbone: nn.Module, head: str = "pooled", **options) -> None:
        super().__init__()
        if head not in HEADS:
            raise unknown("head", head, HEADS)
        self.backbone = backbone
        self.head = HEADS[head](backbone, **options)
        self.dims: int = self.head.dims  # type: ignore[assignment]
        self.branch_dims: tuple[int, ...] = self.head.branch_dims  # type: ignore[assignment]

    def maps(self, images: Tensor):
        """What the head reads: the last map, the maps of all stages, or the maps of both streams."""
        maps = getattr(self.backbone, str(self.head.reads))(images)
        return list(maps) if self.head.reads == "stages" else maps

    def branches(self, images: Tensor) -> list[Branch]:
        """The vectors that training supervises, each with a loss and a classifier of its own: a head has one or more."""
        return self.head.branches(self.maps(images))  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))

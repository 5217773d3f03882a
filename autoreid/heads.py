"""From a backbone's maps to an embedding, and the net that joins the two.

Three heads: ``pooled`` reads the last map, ``exits`` the map of every stage (DaRe), ``streams`` a global map and those of
image regions (HA-CNN, Robust-ReID). The identity classifier belongs to training (train.py): a :class:`ReIDNet` is what
gets deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.compression import Branch, Int8, Keep, Stored, reduction
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


def branch(features: Tensor, neck: nn.Module) -> Branch:
    """The neck stands between the two losses (Luo et al. 2019; SAFR, section 4.2), but L2 before both (Robust-ReID)."""
    if isinstance(neck, L2TestNeck):
        return Branch(features, features)
    after = neck(features)
    return Branch(after if isinstance(neck, L2Neck) else features, after)


def quantised(features: Sequence[Tensor], necks: Sequence[nn.Module], stored: Stored) -> list[Branch]:
    """The branches of vectors that are stored side by side as one embedding; in float32 :func:`branch` of each."""
    found = [branch(x, neck) for x, neck in zip(features, necks, strict=True)]
    return stored.branches(found, [neck(b.classified) if isinstance(neck, L2TestNeck) else b.classified
                                   for b, neck in zip(found, necks, strict=True)])


def apart(neck: str) -> bool:
    """Whether the embedding is another vector than the one that the metric loss reads."""
    return neck not in ("none", "l2")


# ---------------------------------------------------------------------------------------- heads
class PooledHead(nn.Module):
    """The last map: pooling, dropout, optional embedding layer, neck. One branch.

    As in every head, ``slice``, ``rank`` or ``keep`` shorten the embedding before the neck and ``int8`` quantises it
    after: see ``autoreid.compression``.
    """

    reads = "forward"

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "average",
        embedding_dim: int | None = None,
        fc: str = "linear",
        neck: str = "batch",
        dropout: float = 0.0,
        slice: int | None = None,
        rank: int | None = None,
        keep: int | None = None,
        int8: bool = False,
    ) -> None:
        super().__init__()
        _check(pooling, neck, embedding_dim, dropout)
        if fc not in FCS:
            raise unknown("fc", fc, FCS)
        channels: int = backbone.channels  # type: ignore[assignment]
        width = embedding_dim or channels
        self.reduce, self.dims = reduction(width, slice, rank, keep)
        self.branch_dims, self.classified_dims = (self.dims,), (width if rank else self.dims,)
        self.pooling = POOLINGS[pooling](channels)
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Identity() if embedding_dim is None else FCS[fc](channels, embedding_dim)
        self.neck = NECKS[neck](self.dims)
        self.stored = Stored(int8, apart(neck))

    def features(self, x: Tensor) -> Tensor:
        return self.reduce(self.embedding(self.dropout(self.pooling(x))))

    def before_necks(self, x: Tensor) -> list[Tensor]:
        return [self.features(x)]

    def reductions(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.reduce, self.neck)]

    def branches(self, x: Tensor) -> list[Branch]:
        return quantised([self.features(x)], [self.neck], self.stored)

    def before_storage(self, x: Tensor) -> Tensor:
        return self.neck(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(self.before_storage(x))


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
        slice: int | None = None,
        rank: int | None = None,
        keep: int | None = None,
        int8: bool = False,
    ) -> None:
        super().__init__()
        _check(pooling, neck, embedding_dim, dropout)
        if hidden < 1:
            raise UserError(f"hidden is {hidden}; allowed: 1 or more")
        widths: Sequence[int] = backbone.stage_channels  # type: ignore[assignment]
        reduced = [reduction(embedding_dim, slice, rank, keep) for _ in (*widths, "fusion")]
        self.reduces, self.dims = nn.ModuleList(module for module, _ in reduced), reduced[0][1]
        self.branch_dims = (self.dims,) * len(reduced)
        self.classified_dims = (embedding_dim,) * len(reduced) if rank else self.branch_dims
        self.stages = nn.ModuleList(
            nn.Sequential(
                POOLINGS[pooling](channels), nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                nn.Dropout(dropout), nn.Linear(hidden, embedding_dim),
            )
            for channels in widths
        )
        # equal parts to begin with, so that phi has the scale of one phi_s
        self.fusion = nn.Parameter(torch.full((len(widths),), 1 / len(widths)))
        self.necks = nn.ModuleList(NECKS[neck](self.dims) for _ in self.branch_dims)
        self.stores = nn.ModuleList(Stored(int8, apart(neck)) for _ in self.branch_dims)

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """phi_1 .. phi_S, phi, each B x dims, before the necks."""
        phis = [stage(x) for stage, x in zip(self.stages, maps, strict=True)]
        phis = [*phis, sum(w * phi for w, phi in zip(self.fusion, phis, strict=True))]
        return [reduce(phi) for reduce, phi in zip(self.reduces, phis, strict=True)]

    def before_necks(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.features(maps)

    def reductions(self) -> list[tuple[nn.Module, nn.Module]]:
        return list(zip(self.reduces, self.necks, strict=True))

    def branches(self, maps: Sequence[Tensor]) -> list[Branch]:
        return [b for phi, neck, stored in zip(self.features(maps), self.necks, self.stores, strict=True)
                for b in quantised([phi], [neck], stored)]  # type: ignore[arg-type]

    def exits(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What a query that leaves at exit s is compared by: phi_1 .. phi_{S-1}, phi, each B x dims."""
        after = [stored(neck(phi)) for phi, neck, stored in zip(self.features(maps), self.necks, self.stores, strict=True)]
        return [*after[:-2], after[-1]]

    def finish(self, number: int, phi: Tensor) -> Tensor:
        """An exit's embedding from its whole phi: shortened, through its neck, as it is stored."""
        return self.stores[number](self.necks[number](self.reduces[number](phi)))

    def walk(self, maps: Iterable[Tensor]) -> Iterator[Tensor]:
        """:meth:`exits` one by one, from maps that may still be under way, as ``backbone.stages`` yields them: who stops
        reading runs no later stage and no later exit. Eval mode."""
        phis: list[Tensor] = []
        for stage, x in zip(self.stages, maps, strict=False):
            phis.append(stage(x))
            if len(phis) < len(self.stages):
                yield self.finish(len(phis) - 1, phis[-1])
        yield self.finish(-1, sum(w * phi for w, phi in zip(self.fusion, phis, strict=True)))

    def before_storage(self, maps: Sequence[Tensor]) -> Tensor:
        return self.necks[-1](self.features(maps)[-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.stores[-1](self.before_storage(maps))


class StreamsHead(nn.Module):
    """HA-CNN and Robust-ReID: a vector of the whole picture and one of its regions, side by side.

    Reads ``backbone.streams``: the global map B x C x h x w and the regions' maps B x R x C x h' x w'. Each stream is
    pooled and goes through Linear, batch norm and ReLU to ``embedding_dim``; the regions' vectors are joined before.
    Two branches; the embedding is B x (2 * embedding_dim), global first. Where it is shortened, both by the same number
    of dimensions; in int8 both have one scale.
    """

    reads = "streams"

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "gem-channel",
        embedding_dim: int = 512,
        neck: str = "l2",
        slice: int | None = None,
        rank: int | None = None,
        keep: int | None = None,
        int8: bool = False,
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "streams"):
            raise UserError("the head 'streams' needs a backbone with image regions: ha-cnn or robust-reid; allowed for "
                            "this one: pooled, exits")
        _check(pooling, neck, embedding_dim, 0)
        channels: int = backbone.channels  # type: ignore[assignment]
        regions: int = backbone.regions  # type: ignore[assignment]
        self.reduce_global, k = reduction(embedding_dim, slice, rank, keep, parts=2)
        self.reduce_local, _ = reduction(embedding_dim, slice, rank, keep, parts=2)
        self.dims, self.branch_dims = 2 * k, (k, k)
        self.classified_dims = (embedding_dim, embedding_dim) if rank else self.branch_dims
        self.pooling_global, self.pooling_local = POOLINGS[pooling](channels), POOLINGS[pooling](channels)
        self.fc_global, self.fc_local = norm_relu(channels, embedding_dim), norm_relu(regions * channels, embedding_dim)
        self.neck_global, self.neck_local = NECKS[neck](k), NECKS[neck](k)
        self.stored = Stored(int8, apart(neck))

    def features(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The global vector and the regions', each B x dims / 2, before the necks."""
        whole, regions = maps
        pooled = self.pooling_local(regions.flatten(0, 1)).unflatten(0, regions.shape[:2])  # B x R x C
        return (self.reduce_global(self.fc_global(self.pooling_global(whole))),
                self.reduce_local(self.fc_local(pooled.flatten(1))))

    def before_necks(self, maps: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(self.features(maps))

    def reductions(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.reduce_global, self.neck_global), (self.reduce_local, self.neck_local)]

    def branches(self, maps: tuple[Tensor, Tensor]) -> list[Branch]:
        return quantised(self.features(maps), [self.neck_global, self.neck_local], self.stored)

    def before_storage(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        g, regions = self.features(maps)
        return torch.cat([self.neck_global(g), self.neck_local(regions)], dim=1)

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        return self.stored(self.before_storage(maps))


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

    ``forward(images: B x 3 x H x W) -> B x dims`` in train and eval mode alike. Training reads :meth:`branches`. With the
    head's option ``int8`` forward gives the dequantised values of :meth:`codes`.
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
        self.classified_dims: tuple[int, ...] = self.head.classified_dims  # type: ignore[assignment]

    def maps(self, images: Tensor):
        """What the head reads: the last map, the maps of all stages, or the maps of both streams."""
        maps = getattr(self.backbone, str(self.head.reads))(images)
        return list(maps) if self.head.reads == "stages" else maps

    def branches(self, images: Tensor) -> list[Branch]:
        """The vectors that training supervises, each with a loss and a classifier of its own: a head has one or more."""
        return self.head.branches(self.maps(images))  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))

    # ------------------------------------------------------------------------------------ compressed embeddings
    @property
    def int8(self) -> Int8 | None:
        """The quantiser of the embedding, None where it is float32."""
        stored = self.head.stores[-1] if hasattr(self.head, "stores") else self.head.stored  # type: ignore[index]
        return stored.embedding  # type: ignore[union-attr, return-value]

    @property
    def scale(self) -> float | None:
        """An int8 embedding is its codes times this; None where it is float32."""
        return None if self.int8 is None else float(self.int8.scale)

    def codes(self, images: Tensor) -> Tensor:
        """The embedding as it is stored, B x dims int8. Raises UserError where the net was not trained for it."""
        if self.int8 is None:
            raise UserError("this net has float32 embeddings; train one with --set int8=true for int8 codes")
        return self.int8.codes(self.head.before_storage(self.maps(images)))  # type: ignore[operator]

    def before_necks(self, images: Tensor) -> list[Tensor]:
        """Each branch's vector as the metric loss reads it, before it is quantised: what pruning looks at."""
        return self.head.before_necks(self.maps(images))  # type: ignore[operator]

    @torch.no_grad()
    def take_pruned(self, larger: ReIDNet, chosen: Sequence[Tensor]) -> None:
        """All of ``larger``'s weights, with ``chosen`` of each branch's dimensions: ``larger`` is this net with a larger
        ``keep``, or with none."""
        own, theirs = self.state_dict(), larger.state_dict()
        self.load_state_dict({name: theirs[name] if name in theirs and theirs[name].shape == value.shape else value
                              for name, value in own.items()})
        pairs = zip(self.head.reductions(), larger.head.reductions(), chosen, strict=True)  # type: ignore[operator]
        for (reduce, neck), (before, larger_neck), columns in pairs:
            kept = before.kept if isinstance(before, Keep) else torch.arange(1 + int(columns.max()), device=columns.device)
            reduce.kept.copy_(kept.to(columns.device)[columns])
            neck.load_state_dict({name: value[columns.to(value.device)] if value.ndim else value
                                  for name, value in larger_neck.state_dict().items()})

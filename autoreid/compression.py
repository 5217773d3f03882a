"""A smaller embedding: fewer dimensions, one byte each instead of four.

McDermott, "Embedding Compression for Efficient Re-Identification" (2024), section 3. Between a head's features f
(B x d) and its neck stands a :func:`reduction` to z (B x k), which the metric loss reads:

- ``slice``: z is f's first k columns, from the first step of training on; the classifier reads k dimensions too.
- ``rank``: z = f A with a learned A, d x k. The classifier reads neck(z) B with a learned B, k x d, which belongs to
  training alone (``train.Criterion``): a trained net has A and no B. Slicing is the case where A is the first k columns
  of the identity and B its transpose (the paper's footnote 2).
- ``keep``: z is k chosen columns of f, as iterative pruning leaves them (``train.retrain`` with ``prune``): those with
  the largest norm over the training set.

:class:`Stored` with ``int8`` quantises what comes after: uniform, symmetric, one scale for all dimensions ("vanilla
uniform quantization", section 3). k bytes of an embedding and 4 bytes of scale for the whole gallery are stored.

:class:`PCA` and :class:`ProductQuantiser` are references that need no training: they are fitted to the embeddings that a
trained net gives its training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoreid import parallel
from autoreid.errors import UserError, unknown

LEVELS = 127  # codes from -127 to 127: symmetric, so that a distance of codes is a distance of values
LEAST = 1e-12  # of a scale
CENTROIDS = 256  # of a product quantiser: a byte names one
OBSERVED = 0.1  # a new batch's share in the running maximum, as in a batch norm


class Branch(NamedTuple):
    """What training supervises: the vector that the metric loss reads, and the one that the classifier reads."""

    metric: Tensor
    classified: Tensor


BYTES = {"float32": 4, "int8": 1}


def bytes_of(dims: int, dtype: str = "float32") -> int:
    """Of one stored embedding; an int8 gallery's scale, 4 bytes in all, is not in it."""
    if dtype not in BYTES:
        raise unknown("dtype", dtype, BYTES)
    return dims * BYTES[dtype]


def ratio(full: int, dims: int, dtype: str = "float32") -> float:
    """The bytes of the ``full`` float32 embedding divided by those of a compressed one (section 4.2, footnote 1)."""
    return bytes_of(full) / bytes_of(dims, dtype)


# ---------------------------------------------------------------------------------------- fewer dimensions
class Slice(nn.Module):
    """The first k columns. B x d -> B x k."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, features: Tensor) -> Tensor:
        return features[:, : self.dims]


class LowRank(nn.Linear):
    """z = f A. B x d -> B x k; ``weight`` is A transposed, k x d, and there is no bias."""

    def __init__(self, features: int, dims: int) -> None:
        super().__init__(features, dims, bias=False)


class Keep(nn.Module):
    """k chosen columns, in their order. B x d -> B x k; the first k before pruning has chosen any."""

    kept: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(dims))

    def forward(self, features: Tensor) -> Tensor:
        return features.index_select(1, self.kept)


def reduction(
    features: int, slice: int | None, rank: int | None, keep: int | None, parts: int = 1
) -> tuple[nn.Module, int]:
    """The module from B x ``features`` to B x k, and k; an identity without weights where nothing is asked.

    ``parts``: the embedding is so many vectors side by side, of which this reduces one; the options are of the whole.
    Raises UserError: more than one of them, a k that the features do not have or that does not divide.
    """
    asked = {name: k for name, k in (("slice", slice), ("rank", rank), ("keep", keep)) if k is not None}
    if not asked:
        return nn.Identity(), features
    if len(asked) > 1:
        given = ", ".join(f"{name}={k}" for name, k in asked.items())
        raise UserError(f"{given}: each is a way to shorten the embedding; give one of them")
    [(name, k)] = asked.items()
    if not 1 <= k <= parts * features:
        raise UserError(f"{name}={k}: the embedding has {parts * features} dimensions; allowed: 1 to {parts * features}")
    if k % parts:
        raise UserError(f"{name}={k}: the embedding is {parts} vectors side by side, each shortened alike; allowed: "
                        f"multiples of {parts}")
    k //= parts
    return {"slice": lambda: Slice(k), "rank": lambda: LowRank(features, k), "keep": lambda: Keep(k)}[name](), k


def largest_columns(features: Tensor, count: int) -> Tensor:
    """The ``count`` columns of N x D with the largest Euclidean norm, ascending; of equal ones the first (section 3:
    "the smallest frobenius norm on the training set" goes)."""
    norms = features.double().square().sum(0)
    return norms.argsort(descending=True, stable=True)[:count].sort().values


# ---------------------------------------------------------------------------------------- one byte each
class Int8(nn.Module):
    """Codes from -127 to 127 times one scale: forward gives the dequantised float32 values of B x k.

    The gradient goes straight through ("full precision gradients on the backward pass", section 3), also where a value
    is clipped. In training the scale follows the largest absolute value of the batches (of all processes), by a running
    mean that begins with the first finite one; in eval mode it stands. Computed in float32 under autocast too.
    """

    largest: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def scale(self) -> Tensor:
        """The float32 step between two codes: what is stored once for all embeddings, 4 bytes."""
        return (self.largest / LEVELS).clamp(min=LEAST)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        now = parallel.largest(x.detach().float().abs().amax())
        finite = now.isfinite()  # else a step that mixed precision will skip
        now = torch.where(finite, now, self.largest)
        self.largest.copy_(torch.where(self.batches == 0, now, self.largest.lerp(now, OBSERVED)))
        self.batches += finite

    def codes(self, x: Tensor) -> Tensor:
        """B x k int8, halves to the even code."""
        return (x.float() / self.scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            self.observe(x)
        scale = self.scale
        values = (x / scale).round().clamp(-LEVELS, LEVELS) * scale
        return values.detach() + (x - x.detach()) if x.requires_grad else values  # the bracket is 0, with x's gradient


class Stored(nn.Module):
    """What becomes of an embedding that is stored, of one branch or of several side by side: float32 or int8.

    With ``int8`` both losses read quantised vectors. The metric loss reads before the neck, where the scale is another:
    ``metric`` is that one's quantiser, None where no neck stands between (``apart`` False).
    """

    def __init__(self, int8: bool, apart: bool) -> None:
        super().__init__()
        self.embedding = Int8() if int8 else None
        self.metric = Int8() if int8 and apart else None

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding if self.embedding is None else self.embedding(embedding)

    def branches(self, branches: Sequence[Branch], embeddings: Sequence[Tensor]) -> list[Branch]:
        """The branches, quantised; ``embeddings`` is what each contributes to the stored one."""
        if self.embedding is None:
            return list(branches)
        widths = [x.shape[1] for x in embeddings]
        after = self.embedding(torch.cat(list(embeddings), dim=1)).split(widths, dim=1)
        if self.metric is None:
            return [Branch(x, x) for x in after]
        before = self.metric(torch.cat([b.metric for b in branches], dim=1)).split(widths, dim=1)
        alike = [b.classified is b.metric for b in branches]
        return [Branch(x, x if same else y) for x, y, same in zip(before, after, alike, strict=True)]


# ---------------------------------------------------------------------------------------- without training
class PCA(NamedTuple):
    """The principal components of training embeddings: (x - mean) @ axes, N x D -> N x k. Distances within the k axes are
    kept; no whitening."""

    mean: Tensor  # D
    axes: Tensor  # D x k, orthonormal

    @classmethod
    def fit(cls, features: Tensor, dims: int) -> PCA:
        """To N x D training embeddings. Raises UserError: fewer embeddings than would span ``dims`` axes."""
        check_axes(dims, features.shape[1], len(features))
        wide = features.double()
        mean = wide.mean(0)
        _, axes = torch.linalg.eigh((wide - mean).T @ (wide - mean))  # ascending
        return cls(mean.float(), axes.flip(1)[:, :dims].float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features.device)) @ self.axes.to(features.device)


def check_axes(dims: int, full: int, count: int) -> None:
    """Raises UserError where ``count`` embeddings of ``full`` dimensions do not span ``dims`` axes."""
    most = min(full, count - 1)
    if not 1 <= dims <= most:
        raise UserError(f"PCA to {dims} dimensions: {count} training embeddings of {full} span at most {most}; give fewer "
                        "--dims, or leave pca out of --methods")


class ProductQuantiser:
    """A byte per part of the vector: the number of the nearest of its 256 centroids (Jegou et al., "Product Quantization
    for Nearest Neighbor Search", TPAMI 2011). ``codebooks``: of each part 256 x width, the widths differ by one at most.

    The gallery alone is coded: a query is compared with what the codes stand for (their asymmetric distance).
    """

    def __init__(self, codebooks: Sequence[Tensor]) -> None:
        self.codebooks = list(codebooks)
        self.widths = [book.shape[1] for book in self.codebooks]

    @classmethod
    def fit(cls, features: Tensor, parts: int, seed: int = 0, rounds: int = 25) -> ProductQuantiser:
        """By k-means (Lloyd) from random training embeddings N x D. Raises UserError: more parts than dimensions."""
        if not 1 <= parts <= features.shape[1]:
            raise UserError(f"a product quantiser of {parts} bytes: the embeddings have {features.shape[1]} dimensions; "
                            f"allowed: 1 to {features.shape[1]}")
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        features = features.float().cpu()[order]
        return cls([kmeans(part, min(CENTROIDS, len(features)), rounds)
                    for part in features.tensor_split(parts, dim=1)])

    @property
    def shared_bytes(self) -> int:
        return sum(4 * book.numel() for book in self.codebooks)

    def codes(self, features: Tensor) -> Tensor:
        """N x parts uint8."""
        parts = features.float().cpu().split(self.widths, dim=1)
        found = [_nearest(part, book) for part, book in zip(parts, self.codebooks, strict=True)]
        return torch.stack(found, dim=1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """N x D float32: the centroids that the codes name."""
        return torch.cat([book[codes[:, i].long()] for i, book in enumerate(self.codebooks)], dim=1)


def kmeans(points: Tensor, count: int, rounds: int) -> Tensor:
    """``count`` x width centroids of N x width points, from the first points on; N is at least ``count``. A centroid that
    has no point left takes the point that lies farthest from its own."""
    centroids = points[:count].clone()
    for _ in range(rounds):
        nearest = _nearest(points, centroids)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = sizes == 0
        if empty.any():
            far = (points - centroids[nearest]).square().sum(1).argsort(descending=True, stable=True)[: int(empty.sum())]
            sums[empty], sizes[empty] = points[far], 1
        updated = sums / sizes[:, None]
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Of every point the number of the nearest centroid, the first of equal ones."""
    half = centroids.square().sum(1) / 2
    return torch.cat([(half - part @ centroids.T).argmin(1) for part in points.split(8192)])

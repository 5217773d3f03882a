"""k-reciprocal re-ranking, exact and sparse, at about the cost of the all-by-all product; average query expansion.

Re-ranking: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding" (CVPR 2017), k1 = 20, k2 = 6,
lambda = 0.3 as there. Where the paper and its authors' code (github.com/zhunzhong07/person-re-ranking) differ, the
code is followed, since every published number comes from it:

- Original distance: squared Euclidean, once, divided by the image's largest one to any image, queries and gallery
  together (re_ranking.m; the Python version divides by the column's maximum and transposes, the same for a symmetric
  matrix). torchreid hands squared distances to a routine that squares again; that is not done here.
- N(p, k) are the k + 1 first images of p's ranking, so p itself is usually one of them; N(p, k/2) the first
  round(k1 / 2) + 1, halves to even (the Python version; re_ranking.m has round((k1 + 1) / 2), the same for even k1).
- R(q, k/2) is added to R(p, k) if *more* than 2/3 of it lie there (Eq. 4 prints "at least").
- Weights exp(-d) with the divided d, divided by their sum, so that the maxima of Eq. 10 sum to 2 minus the minima's.
- k2 = 1 means no local query expansion. A k beyond the number of images means all of them.

Rankings order exact ties (to 12 digits of the largest distance) by index, queries before gallery; an image without
any k-reciprocal neighbour, crowded out by its duplicates, has Jaccard distance 1 from everybody.

Only k1 neighbours per image are ever kept: top-k per block of rows of the product, reciprocal sets and expansions as
sparse rows, the Jaccard distance by an inverted index. float32 products are trusted as far as their rounding goes;
where it could decide who is a neighbour, distances are computed again in float64 from the features as given.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoreid.errors import UserError, unknown

METRICS = ("euclidean", "cosine")
MEMORY = 256 << 20
TINY = 1e-30  # in place of a largest distance of 0
TIE = 1e-12  # distances nearer than this share of the row's largest are ties
SLACK = 8.0  # times sqrt(D) float32 roundings of |x||y|: what two products may be wrong by (measured: at most 2)


def rerank(
    query_features: Any,
    gallery_features: Any,
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
    metric: str = "euclidean",
    memory: int = MEMORY,
) -> np.ndarray:
    """The N x M float32 matrix of re-ranked distances of queries (N x D) to the gallery (M x D), for small sizes."""
    blocks = reranked_blocks(query_features, gallery_features, k1, k2, lam, metric, memory)
    return np.concatenate([block for _, block in blocks])


def reranked_blocks(
    query_features: Any,
    gallery_features: Any,
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
    metric: str = "euclidean",
    memory: int = MEMORY,
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances, ``(1 - lam) * jaccard + lam * original``, some queries at a time.

    Yields (index of the first query, b x M float32 new array) in order. Features are numpy arrays or tensors of any
    scale; products run on the device of the query's, the sparse part on the CPU. ``cosine`` is Euclidean on features
    divided by their length. Beside one float32 copy of the features and a few kB per image, at most about
    ``memory`` bytes are held at a time, whatever N and M. All queries take part in each other's neighbourhoods.
    Raises UserError: unknown metric, k1 or k2 below 1, lam outside [0, 1], shapes that do not fit, numbers not finite.
    """
    check_rerank(k1, k2, lam)
    images = _Images.of(query_features, gallery_features, metric)
    return _blocks(images, operator.index(k1), operator.index(k2), float(lam), memory)


def expand_queries(
    query_features: Any, gallery_features: Any, k: int = 10, alpha: float = 3.0, memory: int = MEMORY
) -> np.ndarray:
    """New queries, N x D float32 of length 1: the weighted mean of each query and its k nearest gallery features.

    All features are first divided by their length. alpha = 0 is average query expansion, the plain mean (Chum et al.,
    "Total Recall", ICCV 2007); above, the weights are (cosine similarity)^alpha, 1 for the query itself (Radenovic
    et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, whose alpha is 3), 0 for a negative
    similarity. Neighbours at equal distance come in gallery order; a k beyond the gallery means all of it.
    Raises UserError: k below 1, a negative alpha, shapes that do not fit, numbers not finite.
    """
    check_expand(k, alpha)
    images = _Images.of(query_features, gallery_features, "cosine")
    count, total = images.queries, len(images.ready)
    wanted = min(operator.index(k), total - count)
    rows = _block_rows(memory, total)
    nearest = _nearest(images, range(count), range(count, total), (wanted,), rows).places
    expanded = np.empty((count, images.ready.shape[1]), np.float32)
    step = max(1, rows // wanted)
    for start in range(0, count, step):
        some = torch.arange(start, min(start + step, count))
        own = images.given(some)  # b x D
        chosen = torch.from_numpy(nearest[start : start + step]).long() + count
        found = images.given(chosen.flatten()).view(*chosen.shape, -1)  # b x k x D
        weight = (found @ own[:, :, None]).clamp_(min=0) ** alpha  # b x k x 1; 0 ** 0 is 1
        expanded[start : start + step] = F.normalize(own + (weight * found).sum(1)).cpu().numpy()
    return expanded


# ------------------------------------------------------------------------------------------------ images and neighbours


class _Images(NamedTuple):
    """All T = N + M images, the queries first: as given, for exact distances, and made ready for products."""

    sides: tuple[Tensor, Tensor]  # N x D and M x D, float32 or float64
    cosine: bool
    scale: float  # what ready is scaled by, a power of two
    ready: Tensor  # T x D float32: moved to have one image at the origin, scaled to lengths of at most 1
    squared: Tensor  # T float32: squared lengths of ready

    @property
    def queries(self) -> int:
        """N."""
        return len(self.sides[0])

    @classmethod
    def of(cls, query_features: Any, gallery_features: Any, metric: str) -> _Images:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        query, gallery = _features(query_features, "query"), _features(gallery_features, "gallery")
        if query.shape[1] != gallery.shape[1]:
            raise UserError(
                f"query features have {query.shape[1]} dimensions and gallery features {gallery.shape[1]}; "
                "both must come from the same network"
            )
        sides, cosine = (query, gallery.to(query.device)), metric == "cosine"
        parts = [part for side in sides for part in side.split(2048)]
        # A common offset would drown small distances in the rounding of large products, so the image nearest to the
        # mean becomes the origin. An image, and a power of two, keep whole numbers whole and equal features zero.
        mean = torch.stack([_unit(part, cosine).sum(0) for part in parts]).sum(0) / sum(map(len, parts))
        spread = torch.cat([(_unit(part, cosine) - mean).abs().amax(1) for part in parts])
        reach = float(spread.max() + spread.min()) * math.sqrt(len(mean))
        scale = 2.0 ** -max(math.frexp(reach)[1], -1000) if reach else 1.0
        centre = _given(sides, cosine, spread.argmin()[None])
        ready = torch.cat([((_unit(part, cosine) - centre) * scale).float() for part in parts])
        squared = torch.cat([part.double().square().sum(1).float() for part in ready.split(2048)])
        return cls(sides, cosine, scale, ready, squared)

    def given(self, which: Tensor) -> Tensor:
        """The features of P images in float64, P x D, of length 1 for cosine."""
        return _given(self.sides, self.cosine, which.to(self.ready.device))

    def exact(self, i: Tensor, j: Tensor) -> Tensor:
        """Squared distance of each pair, P and P indices to P float64, in the scale of ready but from what was given."""
        pairs = zip(i.split(2048), j.split(2048))
        return torch.cat([((self.given(a) - self.given(b)) * self.scale).square_().sum(1) for a, b in pairs])

    def distances(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The same in float32 from ready."""
        pairs = zip(*(torch.from_numpy(x).to(self.ready.device).split(2048) for x in (i, j)))
        return torch.cat([(self.ready[a] - self.ready[b]).square_().sum(1) for a, b in pairs]).cpu().numpy()


def _given(sides: tuple[Tensor, Tensor], cosine: bool, which: Tensor) -> Tensor:
    rows = torch.empty(len(which), sides[0].shape[1], dtype=torch.float64, device=which.device)
    is_query = which < len(sides[0])
    rows[is_query] = sides[0][which[is_query]].double()
    rows[~is_query] = sides[1][which[~is_query] - len(sides[0])].double()
    return _unit(rows, cosine)


class _Neighbours(NamedTuple):
    """The nearest images of R images."""

    places: np.ndarray  # R x K int32: which they are
    distances: np.ndarray  # R x K float32, squared, in the scale of _Images.ready
    farthest: np.ndarray  # R float32: the largest distance to any image


def _nearest(images: _Images, rows: range, columns: range, cuts: tuple[int, ...], block: int) -> _Neighbours:
    """For each image of ``rows`` its max(cuts) nearest of ``columns``, numbered from the first of these.

    For each of ``cuts`` the first ``cut`` of a row are exactly the ``cut`` nearest; only the order in between is not exact.
    """
    width, count = max(cuts), len(columns)
    right, shift = images.ready[columns.start : columns.stop], images.squared[columns.start : columns.stop]
    rounding = SLACK * math.sqrt(right.shape[1]) * torch.finfo(torch.float32).eps
    after = torch.tensor([cut for cut in cuts if cut < count], dtype=torch.long, device=right.device)
    buffer = torch.empty(min(block, len(rows)), count, device=right.device)
    pieces = []
    for start in range(rows.start, rows.stop, block):
        chosen = slice(start, min(start + block, rows.stop))
        out = torch.addmm(shift, images.ready[chosen], right.T, alpha=-2, out=buffer[: chosen.stop - start])
        own = images.squared[chosen][:, None]  # missing in out: no order depends on it
        far = (out.amax(1, keepdim=True) + own).clamp_(min=0)
        value, place = out.topk(min(width + 1, count), largest=False)
        distance = (value + own).clamp_(min=0)
        same = far == 0  # a row of equal images: places are by index, and nothing needs a second look
        place = torch.where(same, torch.arange(place.shape[1], device=place.device), place)
        # Whoever is within the last cut, by computed or by true distance, has length at most |x| + that distance.
        slack = rounding * (own.sqrt() + distance[:, width - 1 : width].sqrt()).square() + 2 * TIE * far
        doubtful = (value[:, after] - value[:, after - 1] <= slack).any(1) & ~same[:, 0]
        for some in doubtful.nonzero().flatten().split(32) if doubtful.any() else ():
            turn, column = (out[some] <= value[some, width - 1 : width] + slack[some]).nonzero().cpu().T
            row = some.cpu()[turn]
            true = images.exact(start + row, columns.start + column).cpu()
            digits = (true / far.cpu()[row, 0] / TIE).round()
            # Row by row, in each by distance, ties by index.
            order = torch.from_numpy(np.lexsort((column.numpy(), digits.numpy(), turn.numpy())))
            first = order[torch.searchsorted(turn, torch.arange(len(some)))[:, None] + torch.arange(width)]
            place[some, :width] = column[first].to(place.device)
            distance[some, :width] = true[first].to(distance)
        pieces.append((place[:, :width].int().cpu(), distance[:, :width].cpu(), far[:, 0].cpu()))
    return _Neighbours(*(torch.cat(arrays).numpy() for arrays in zip(*pieces)))


# ---------------------------------------------------------------------------------------------------------- sparse rows


class _Rows(NamedTuple):
    """A sparse matrix by rows (CSR)."""

    starts: np.ndarray  # R + 1
    columns: np.ndarray  # int32, ascending within a row
    values: np.ndarray  # float32

    @classmethod
    def of(cls, count: int, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _Rows:
        """From (rows, columns, values) of consecutive blocks, rows ascending."""
        rows, columns, values = (np.concatenate(arrays) for arrays in zip(*pieces))
        return cls(np.searchsorted(rows, np.arange(count + 1)), columns, values)

    def take(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All entries of these rows, one row after the other: (which of them, position in columns and values)."""
        lengths = self.starts[which + 1] - self.starts[which]
        turn = np.repeat(np.arange(len(which)), lengths)
        ends = np.cumsum(lengths)
        return turn, np.arange(len(turn)) + np.repeat(self.starts[which] - (ends - lengths), lengths)


def _summed(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, ascending, and the sum of each one's values."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return key[first], np.add.reduceat(value[order], first) if len(first) else value


def _mutual(neighbours: np.ndarray, block: int) -> np.ndarray:
    """T x K: does the neighbour have the image among its own K neighbours."""
    images = np.arange(len(neighbours), dtype=np.int32)[:, None, None]
    starts = range(0, len(neighbours), block)
    pieces = [neighbours[neighbours[s : s + block]] == images[s : s + block] for s in starts]  # b x K x K each
    return np.concatenate([piece.any(2) for piece in pieces])


def _encode(images: _Images, neighbours: _Neighbours, first: int, half: int, block: int) -> _Rows:
    """T x T sparse: the k-reciprocal features (Eq. 7) over the expanded reciprocal sets (Eq. 4)."""
    near = np.ascontiguousarray(neighbours.places[:, :first])  # N(p, k1)
    nearer = np.ascontiguousarray(near[:, :half])  # N(p, k1 / 2)
    mutual, nearer_mutual = _mutual(near, block), _mutual(nearer, block)  # whereof R(p, k1) and R(p, k1 / 2)
    sizes = nearer_mutual.sum(1)
    total = len(near)
    marks = np.zeros((min(block, total), total), bool)
    pieces = []
    for start in range(0, total, block):
        row, at = np.nonzero(mutual[start : start + block])
        member = near[start + row, at]  # the reciprocal sets of the block: P pairs (row, member)
        marks[row, member] = True
        theirs, are = nearer[member], nearer_mutual[member]  # P x half: the members' own smaller sets
        shared = (marks[row[:, None], theirs] & are).sum(1)
        marks[row, member] = False
        are &= (3 * shared > 2 * sizes[member])[:, None]
        key = np.concatenate([row * total + member, np.repeat(row, are.sum(1)) * total + theirs[are]])
        key, origin = np.unique(key, return_index=True)  # a pair that is twice there counts as the first
        known = origin < len(row)
        distance = np.empty(len(key), np.float32)
        distance[known] = neighbours.distances[start + row, at][origin[known]]
        row, member = key // total, key % total
        distance[~known] = images.distances(start + row[~known], member[~known])
        weight = np.exp(-distance / np.maximum(neighbours.farthest[start + row], TINY))
        weight /= np.bincount(row, weight)[row]
        pieces.append((start + row, member.astype(np.int32), weight))
    return _Rows.of(total, pieces)


def _expand(rows: _Rows, neighbours: np.ndarray, block: int) -> _Rows:
    """Local query expansion (Eq. 11): each row becomes the mean over its k2 neighbours' rows."""
    total, k2 = neighbours.shape
    pieces = []
    for start in range(0, total, block):
        turn, at = rows.take(neighbours[start : start + block].flatten())
        key, value = _summed(turn // k2 * total + rows.columns[at], rows.values[at])
        pieces.append((start + key // total, (key % total).astype(np.int32), value / np.float32(k2)))
    return _Rows.of(total, pieces)


def _inverted(rows: _Rows, first: int) -> _Rows:
    """The transpose of the rows from ``first`` on: for each column the rows that hold it, numbered from 0."""
    total = len(rows.starts) - 1
    turn, at = rows.take(np.arange(first, total))
    columns = rows.columns[at]
    order = np.argsort(columns, kind="stable")
    return _Rows.of(total, [(columns[order], turn[order].astype(np.int32), rows.values[at][order])])


def _blocks(images: _Images, k1: int, k2: int, lam: float, memory: int) -> Iterator[tuple[int, np.ndarray]]:
    """What reranked_blocks yields."""
    count, total = images.queries, len(images.ready)
    first, half, k2 = min(k1 + 1, total), min(round(k1 / 2) + 1, total), min(k2, total)
    block = _block_rows(memory, total)
    neighbours = _nearest(images, range(total), range(total), (first, half, k2), block)
    features = _encode(images, neighbours, first, half, block)
    if k2 > 1:
        features = _expand(features, neighbours.places[:, :k2], block)
    holders = _inverted(features, count)

    right, shift = images.ready[count:], images.squared[count:]
    for start in range(0, count, block):
        chosen = slice(start, min(start + block, count))
        # Everybody's distance as if no neighbour were shared, then less for those that share some.
        out = torch.addmm(shift, images.ready[chosen], right.T, alpha=-2)
        share = lam / torch.from_numpy(neighbours.farthest[chosen]).to(out.device).clamp_(min=TINY)
        base = share * images.squared[chosen] + (1 - lam)
        final = torch.addcmul(base[:, None], share[:, None], out, out=out).cpu().numpy()
        for queries, smaller in _shared(features, holders, np.arange(chosen.start, chosen.stop), total - count, memory):
            final[queries[0] - start : queries[-1] + 1 - start] -= (1 - lam) * (smaller / (2 - smaller))
        yield start, final


def _shared(
    features: _Rows, holders: _Rows, queries: np.ndarray, gallery: int, memory: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A few queries at a time, (b indices, b x M): the sum over all images of the smaller of the two features."""
    lengths = np.diff(holders.starts)
    turn, at = features.take(queries)
    # A hub, near to everybody, has a long list of holders: as many queries at a time as there is room for the pairs.
    pairs = np.bincount(turn, lengths[features.columns[at]], minlength=len(queries))
    budget = min(memory // 64, 1 << 20)
    for some in np.split(queries, 1 + np.flatnonzero(np.diff(np.cumsum(pairs + gallery) // max(budget, 1)))):
        turn, at = features.take(some)
        again, holder = holders.take(features.columns[at])
        smaller = np.minimum(features.values[at][again], holders.values[holder])
        key = turn[again] * gallery + holders.columns[holder]
        yield some, np.bincount(key, smaller, minlength=len(some) * gallery).reshape(len(some), gallery)


# --------------------------------------------------------------------------------------------------------------- inputs


def _block_rows(memory: int, columns: int) -> int:
    """Rows at a time: a float32 row of distances, and as much again for what is made of it; more than 512 gain nothing."""
    return max(1, min(512, int(memory) // (8 * columns)))


def _unit(features: Tensor, cosine: bool) -> Tensor:
    """In float64, divided by their length for cosine (a zero vector stays zero)."""
    return F.normalize(features.double(), eps=1e-150) if cosine else features.double()


def check_rerank(k1: Any, k2: Any, lam: float) -> None:
    """Raise UserError for constants that re-ranking cannot have."""
    for name, k in (("k1", k1), ("k2", k2)):
        _check_count(name, k)
    if not 0 <= lam <= 1:
        raise UserError(
            f"lambda must lie in [0, 1] (0: Jaccard distance alone, 1: original distance alone), got {lam}; the paper "
            "has 0.3"
        )


def check_expand(k: Any, alpha: float) -> None:
    """Raise UserError for constants that query expansion cannot have."""
    _check_count("k", k)
    if not (0 <= alpha < math.inf):
        raise UserError(f"alpha must be 0 (plain mean) or above, got {alpha}; Radenovic et al. have 3")


def _check_count(name: str, k: Any) -> None:
    try:
        good = operator.index(k) >= 1
    except TypeError:
        good = False
    if not good:
        raise UserError(f"{name} must be a whole number of neighbours, 1 or more, got {k}")


def _features(features: Any, side: str) -> Tensor:
    """N x D float32 or float64, as a view where it already is."""
    if not isinstance(features, Tensor):
        features = np.asarray(features)
        if features.dtype.kind not in "fiu":
            raise UserError(f"{side} features must be numbers (N x D floats), got dtype {features.dtype}")
        features = torch.from_numpy(np.ascontiguousarray(features))
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(
            f"{side} features must be N x D with at least one row, got shape {tuple(features.shape)}; "
            "store one row per image"
        )
    features = features.detach().to(torch.float32 if features.element_size() < 4 else features.dtype)
    features = features if features.is_floating_point() else features.double()
    if not all(torch.isfinite(part).all() for part in features.split(4096)):
        raise UserError(
            f"{side} features hold NaN or infinite numbers; the network diverged or was fed such images: "
            "extract them again from a good checkpoint"
        )
    return features

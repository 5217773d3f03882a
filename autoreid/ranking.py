"""The rank of every positive, exact, from features, at about the cost of the query x gallery product itself.

CMC, mAP and mINP need only the ranks of the positives, and a rank is a count. So the gallery is never sorted: distances
are computed for a block of queries into one reused buffer; per query, only entries up to the farthest positive matter;
these are gathered and sorted as bare values, and the positives looked up among them.

The product is in single precision, the ranks are those of double precision. What lies so near a positive that rounding
could decide is measured again, coordinate by coordinate; where that is much of the gallery (a network that gives nearly
the same feature for everything), the query's row is multiplied again in double precision about the gallery's mean. So
equal features tie wherever they stand, ties rank by gallery order, and all devices and block sizes give the same ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoreid.errors import UserError
from autoreid.protocols import Matches, Part

MEMORY = 256 << 20  # bytes
BLOCK = 256  # rows of a block at most: more gain nothing, and the ranking of the last one is hidden by no product
LARGEST_NORM = 1e18  # its square fits in float32, and so does the square of a distance


class Features(NamedTuple):
    """One side's features: N x D as they were given, as float32 (the same tensor if they are), and their norms."""

    given: Tensor
    single: Tensor
    norms: Tensor  # N, float64

    @classmethod
    def of(cls, features: Any, side: str) -> Features:
        """From an array or tensor. Raises UserError: no numbers, no N x D, a row that is not finite."""
        given = features.detach() if isinstance(features, Tensor) else _from_array(features, side)
        if given.dtype is torch.bool or given.is_complex():
            raise UserError(f"{side} features must be numbers (N x D floats), got dtype {given.dtype}")
        if given.ndim != 2 or 0 in given.shape:
            raise UserError(
                f"{side} features must be N x D with at least one row, got shape {tuple(given.shape)}; "
                "store one row per image"
            )
        if given.dtype is torch.bfloat16:  # which numpy has not
            given = given.float()
        elif not given.is_floating_point():
            given = given.double()
        parts = given.split(_rows(given))
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
        bad = torch.nonzero(~(norms <= LARGEST_NORM)).flatten()
        if len(bad):
            raise _not_usable(given, bad, side)
        return cls(given, given.float(), norms)

    def take(self, rows: np.ndarray | slice) -> Features:
        if isinstance(rows, slice):
            return self
        index = torch.from_numpy(rows).to(self.given.device)
        single = self.single[index]
        return Features(single if self.given is self.single else self.given[index], single, self.norms[index])

    def to(self, device: torch.device) -> Features:
        single = self.single.to(device)
        return Features(single if self.given is self.single else self.given.to(device), single, self.norms.to(device))


def _from_array(features: Any, side: str) -> Tensor:
    try:
        array = np.asarray(features)
    except ValueError as error:
        raise UserError(f"{side} features must be N x D numbers, but the rows differ in length") from error
    if array.dtype.kind not in "fiu":
        raise UserError(f"{side} features must be numbers (N x D floats), got dtype {array.dtype}")
    if array.dtype not in (np.float16, np.float32) or not array.dtype.isnative:
        array = array.astype(np.float64, copy=False)
    with warnings.catch_warnings():  # a file that is mapped for reading only is fine: nothing is written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def _not_usable(given: Tensor, bad: Tensor, side: str) -> UserError:
    finite = torch.isfinite(given[bad]).all(1)
    also = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    if finite.all():
        return UserError(
            f"{side} features are too large in row {int(bad[0])}{also}: a row's length is at most {LARGEST_NORM:g}; "
            "divide all features of query and gallery by one number"
        )
    bad = bad[~finite]
    also = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return UserError(
        f"{side} features hold NaN or infinite numbers in row {int(bad[0])}{also}, counting from 0; the network diverged "
        "or was fed such images: extract them again from a good checkpoint"
    )


def ranks_of_features(
    query: Features, gallery: Features, metric: str, part: Part, memory: int = MEMORY
) -> list[np.ndarray]:
    """For each query with a positive, the ascending 1-based ranks of its positives.

    ``memory`` bytes are what the blocks of distances may take, or a few rows of the gallery's length if that is more.
    """
    rows = part.matches.scored()  # queries without a match are not even multiplied
    if not len(rows):
        return []
    space = _Space(query, gallery.take(part.gallery), metric, part.matches.dropped)
    height = max(1, min(len(rows), BLOCK, memory // (12 * space.width)))  # two buffers of float32, a third for the rest
    buffers = [torch.empty(height, space.width, device=query.single.device) for _ in range(2)]
    threads = max(1, torch.get_num_threads())
    most = 64 + space.width // 32  # measuring more one by one costs more than the row in double precision
    blocks = [rows[start : start + height] for start in range(0, len(rows), height)]
    ranks: list[np.ndarray] = []
    # While the workers rank one block, the product of the next is under way in the other buffer, and nothing else is:
    # small steps here would each wait for the interpreter, which the workers hold. These use numpy alone, as torch
    # would give each of them threads of its own, which wait by spinning.
    with _full_precision(), ThreadPoolExecutor(threads) as pool:
        left, lengths = space.centred(part.queries[blocks[0]])
        pending: list[Future] = []
        for turn, block in enumerate(blocks):
            distances = space.single(left, buffers[turn % 2][: len(block)])
            if turn:
                ranks += _settled(pending, blocks[turn - 1], part, space)
            slack = space.slack(lengths, single=True)
            if turn + 1 < len(blocks):
                left, lengths = space.centred(part.queries[blocks[turn + 1]])
            edges = [len(block) * i // threads for i in range(threads + 1)]
            pending = [
                pool.submit(_rank_rows, distances, block, range(a, b), part.matches, slack, most)
                for a, b in zip(edges, edges[1:])
            ]
        ranks += _settled(pending, blocks[-1], part, space)
    return ranks


class _Ranked(NamedTuple):
    """Ranks, and what is open of them."""

    ranks: list[np.ndarray]
    crowds: list[_Crowd]
    open_rows: list[int]


class _Crowd(NamedTuple):
    """The gallery entries that may or may not rank before a positive, itself among them."""

    row: int
    which: int  # of the row's ranks
    positive: int
    columns: np.ndarray


def _settled(pending: list[Future], block: np.ndarray, part: Part, space: _Space) -> list[np.ndarray]:
    """The ranks of a block's queries: what single precision leaves open by exact distances, or the whole row once more."""
    found = [future.result() for future in pending]
    ranks = [rank for some in found for rank in some.ranks]
    crowds = [crowd for some in found for crowd in some.crowds]
    open_rows = [r for some in found for r in some.open_rows]
    asking = part.queries[block]
    if crowds:
        space.settle(ranks, crowds, asking)
    few = max(1, len(block) // 4)
    for start in range(0, len(open_rows), few):
        again = np.array(open_rows[start : start + few])
        distances, lengths = space.double(asking[again])
        slack = space.slack(lengths, single=False)
        closed = _rank_rows(distances, block[again], range(len(again)), part.matches, slack)
        for r, rank in zip(again, closed.ranks, strict=True):
            ranks[r] = rank
    return ranks


def rank_rows(distances: np.ndarray, queries: np.ndarray, matches: Matches) -> list[np.ndarray]:
    """The ascending 1-based ranks of the positives of each query, one row of distances each; equal ones tie.

    The rows are overwritten: NaN marks what is no part of the ranking.
    """
    return _rank_rows(distances, queries, range(len(queries)), matches, lambda r, wanted: np.zeros_like(wanted)).ranks


def _rank_rows(
    distances: np.ndarray,
    queries: np.ndarray,
    rows: range,
    matches: Matches,
    slack: Callable[[int, np.ndarray], np.ndarray],
    most: int | None = None,
) -> _Ranked:
    """Ranks of these ``rows``, where distances no farther apart than ``slack`` tie.

    With ``most``, these are left open instead: as crowds, or as whole rows where more than ``most`` entries are.
    """
    ranks: list[np.ndarray] = []
    crowds: list[_Crowd] = []
    open_rows: list[int] = []
    for r in rows:
        row = distances[r]
        positives, junk = matches.of_query(queries[r])
        row[junk] = np.nan  # compares false with everything
        wanted = row[positives]
        order = wanted.argsort()
        positives, wanted = positives[order], wanted[order]
        near = slack(r, wanted)
        low, high = wanted - near, wanted + near
        nearer = row <= high[-1]
        if np.count_nonzero(nearer) <= max(256, len(row) // 16):
            columns, elsewhere = np.flatnonzero(nearer), np.zeros(1, np.intp)
        else:
            columns, elsewhere = _around(row, low, high)
        values = row[columns]
        order = values.argsort()
        values = values[order]
        begin, end = values.searchsorted(low, "left"), values.searchsorted(high, "right")
        rank = elsewhere + begin + 1
        ranks.append(rank)
        crowded = np.flatnonzero(end > begin + 1)
        if not len(crowded):
            continue
        if most is not None and (end - begin)[crowded].sum() > most:
            open_rows.append(r)
            continue
        columns = columns[order]
        for k in crowded:
            window = columns[begin[k] : end[k]]
            if most is None:  # those earlier in the gallery come first
                rank[k] += np.count_nonzero(window < positives[k])
            else:
                crowds.append(_Crowd(r, int(k), int(positives[k]), window))
        if most is None:
            rank.sort()
    return _Ranked(ranks, crowds, open_rows)


def _around(row: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns whose values may lie in a window [low, high], and how many others lie below each.

    Counts in bins instead of a sort, for rows with much of the gallery before the last positive. A bin is a function
    of the value that never falls, so only the bins of a window's ends need a look at the values.
    """
    bins = 4096
    start = np.fmin.reduce(row)  # junk is NaN
    with np.errstate(all="ignore"):
        scale = (bins - 1) / (high[-1] - start)
        if not (np.isfinite(start) and 0 < scale < np.inf):
            return np.flatnonzero(row <= high[-1]), np.zeros(len(low), np.intp)

        def bin_of(values: np.ndarray) -> np.ndarray:
            scaled = np.subtract(values, start)
            scaled *= scale
            return np.fmin(scaled, bins, out=scaled).astype(np.intp)  # junk and the farthest in the last bin

        bin_of_row, first, last = bin_of(row), bin_of(np.maximum(low, start)), bin_of(high)
    looked_at = np.zeros(bins + 1, bool)
    for a, b in zip(first, last, strict=True):
        looked_at[a : b + 1] = True
    others = np.bincount(bin_of_row, minlength=bins + 1)
    others[looked_at] = 0
    return np.flatnonzero(looked_at[bin_of_row]), (others.cumsum() - others)[first]


@dataclass
class _Space:
    """Distances between queries and one gallery, in single precision and exact.

    A query's row is |g - c|^2 - 2 (q - c) g with a point c in the midst of the gallery: the squared distance less a
    number that is the same for the row and changes no rank. Rounding then fits the spread of the features, not their
    distance from the origin. For the cosine all are divided by their length first.
    """

    query: Features
    gallery: Features
    metric: str
    dropped: np.ndarray  # gallery columns that are no part of any ranking

    def __post_init__(self) -> None:
        self.width, self.dims = self.gallery.single.shape
        norms = self.gallery.norms
        sample = self._double(self.gallery, slice(0, None, 1 + self.width // 256))
        self.centre = sample.median(0).values  # D; any point would do, and an outlier does not move this one
        chunks = (self._double(self.gallery, chunk) for chunk in self._chunks(self.width))
        squares = torch.cat([(chunk - self.centre).square_().sum(1) for chunk in chunks])
        # Without a direction, a cosine of 0: the squared distance 2 of unit vectors, of which |q| gives 1.
        self.extra = (norms == 0).double() if self.metric == "cosine" else torch.zeros_like(norms)
        squares += self.extra
        squares[torch.from_numpy(self.dropped).to(squares.device)] = torch.nan
        self.shift = squares.float()  # M
        self.scale = torch.where(norms > 0, 1 / norms.clamp(min=1e-30), 0).float()  # M
        self.longest = float(norms.max()) if self.metric == "euclidean" else 1.0
        self.shortest = 1.0 if self.metric == "euclidean" else max(1e-60, float(torch.where(norms > 0, norms, 1).min()))
        # Errors of a product grow with the root of its length (Higham and Mary, SIAM J. Sci. Comput. 2019); this is
        # 10 times the largest seen on random features and 3 times that on features of one sign.
        self.roundings = 8 + math.sqrt(self.dims)

    def centred(self, asking: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """q - c, R x D float32, and its length, R."""
        left = torch.empty(len(asking), self.dims, device=self.centre.device)
        lengths = torch.empty(len(asking), dtype=torch.float64, device=self.centre.device)
        for chunk in self._chunks(len(asking)):
            centred = self._double(self.query, asking[chunk]) - self.centre
            left[chunk], lengths[chunk] = centred, centred.norm(dim=1)
        return left, lengths.cpu().numpy()

    def single(self, left: Tensor, out: Tensor) -> np.ndarray:
        """R x M float32 from the centred queries."""
        if self.metric == "euclidean":
            torch.addmm(self.shift, left, self.gallery.single.T, alpha=-2, out=out)
        else:
            torch.mm(left, self.gallery.single.T, out=out)
            torch.addcmul(self.shift, out, self.scale, value=-2, out=out)
        return out.cpu().numpy()

    def slack(self, lengths: np.ndarray, single: bool) -> Callable[[int, np.ndarray], np.ndarray]:
        """For row r: how far from these distances others must be for their order to be certain."""
        unit, underflow = (2.0**-24, 2.0**-125 * self.dims / self.shortest) if single else (2.0**-53, 1e-300)
        offset = float(self.centre.norm())

        def of_row(r: int, distances: np.ndarray) -> np.ndarray:
            length = float(lengths[r])
            reach = length + np.sqrt(np.maximum(distances + length * length, 0))  # |g - c| of what is as near as that
            factor = np.minimum(reach + offset, self.longest) if single else reach  # |g|, the product's other factor
            return 2 * (unit * (2 * self.roundings * length * factor + 4 * reach * reach) + underflow)

        return of_row

    def settle(self, ranks: list[np.ndarray], crowds: list[_Crowd], asking: np.ndarray) -> None:
        """Rank the positives in crowds by the exact distances."""
        lengths = np.array([len(crowd.columns) for crowd in crowds])
        columns = np.concatenate([crowd.columns for crowd in crowds])
        rows = np.repeat([crowd.row for crowd in crowds], lengths)
        positives = np.repeat([crowd.positive for crowd in crowds], lengths)
        exact = self.exact(asking[rows], columns)
        its_own = np.repeat(exact[columns == positives], lengths)
        # Two sums of the same numbers, or of their cosines, may still differ in the last bits.
        tie = 1e-14 * its_own
        if self.metric == "cosine":
            tie = tie + 1e-15 * np.sqrt(its_own) + 1e-30
        before = (exact < its_own - tie) | ((exact <= its_own + tie) & (columns < positives))
        counts = np.add.reduceat(before, np.cumsum(lengths) - lengths, dtype=np.int64)
        for crowd, count in zip(crowds, counts, strict=True):
            ranks[crowd.row][crowd.which] += count
        for row in {crowd.row for crowd in crowds}:
            ranks[row].sort()

    def exact(self, asking: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """P: the squared distance of each pair, coordinate by coordinate in double precision."""
        found = []
        for chunk in self._chunks(len(columns)):
            left, right = self._double(self.query, asking[chunk]), self._double(self.gallery, columns[chunk])
            found.append(((left - right).square_().sum(1) + _take(self.extra, columns[chunk])).cpu().numpy())
        return np.concatenate(found)

    def double(self, asking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """R x M float64, and R: the queries' distances from the centre."""
        left = self._double(self.query, asking) - self.centre
        out = torch.empty(len(asking), self.width, dtype=torch.float64, device=left.device)
        for start in range(0, self.width, 2048):
            chunk = slice(start, start + 2048)
            right = self._double(self.gallery, chunk) - self.centre
            out[:, chunk] = torch.addmm(right.square().sum(1) + self.extra[chunk], left, right.T, alpha=-2)
        out[:, torch.from_numpy(self.dropped).to(out.device)] = torch.nan
        return out.cpu().numpy(), left.norm(dim=1).cpu().numpy()

    def _double(self, side: Features, rows: np.ndarray | slice) -> Tensor:
        chosen = _take(side.given, rows).double()
        if self.metric == "euclidean":
            return chosen
        norms = _take(side.norms, rows)
        return chosen / torch.where(norms > 0, norms, 1)[:, None]

    def _chunks(self, count: int) -> list[slice]:
        step = _rows(self.gallery.given)
        return [slice(start, start + step) for start in range(0, count, step)]


def _take(values: Tensor, rows: np.ndarray | slice) -> Tensor:
    if isinstance(rows, slice):
        return values[rows]
    if values.device.type == "cpu":  # torch gathers with all threads, however few the rows
        return torch.from_numpy(values.numpy()[rows])
    return values[torch.from_numpy(rows).to(values.device)]


def _rows(features: Tensor) -> int:
    """Rows to go through at once: no second copy of the features. On the CPU they stay in the cache, and below the size
    from which torch splits the work among threads: waiting for them would cost more."""
    return max(1, (32_000 if features.device.type == "cpu" else 4_000_000) // features.shape[1])


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, also where the program allows TF32 or bfloat16: the slack is counted for that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

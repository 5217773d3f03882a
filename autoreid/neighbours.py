"""The nearest vectors of a gallery: exact in float, exact in integers, and by faiss where an approximation is enough.

A search keeps no query x gallery matrix: the gallery is passed once in pieces that grow, and after every piece only what
may still be among the nearest k stays. Pieces begin small, so that the first limit is cheap and the next pieces have few
candidates; memory is bounded however large the gallery.

Exact means: the answers are those of a sort of all distances in double precision, ties by gallery order. Float products
are in single precision; what rounding could decide is measured again, coordinate by coordinate, in double. Products of
int8 codes are whole numbers and need no second look.

Every gallery here has ``search(query, k) -> Found``, ``bytes`` (what it keeps in memory) and ``len()``. All on the CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from autoreid.errors import UserError, unknown
from autoreid.ranking import Features

BLOCK = 1 << 20  # query x gallery values at once: 4 MB, which stay in the cache
QUERIES = 256  # at once
ROWS = 1024  # of the gallery, where they are converted: no second copy of it
POOL = 1 << 22  # candidates kept before they are measured exactly
LARGEST = 127  # of a symmetric int8 code; -128 is not used


class Found(NamedTuple):
    """The k nearest of each query, nearest first."""

    distances: np.ndarray  # Q x k float32, Euclidean
    indices: np.ndarray  # Q x k int64, places in the gallery


class Gallery(Protocol):
    """What can be searched."""

    @property
    def bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def search(self, query: Any, k: int) -> Found: ...


def nearest(query: Any, gallery: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of ``gallery`` (N x D) to each row of ``query`` (Q x D) by Euclidean distance: distances Q x k float32,
    indices Q x k int64; ties by gallery order. Fewer columns where the gallery has fewer than k rows.

    Arrays or tensors. Raises UserError: shapes that do not fit, numbers that are not finite, k below 1.
    """
    return FloatGallery(gallery).search(query, k)


# ---------------------------------------------------------------------------------------- the running k nearest
def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"the {k} nearest: allowed is 1 or more")


def _check_dims(query: Tensor, dims: int) -> None:
    if query.shape[1] != dims:
        raise UserError(f"the query has {query.shape[1]} dims and the gallery {dims}: both must come from one network")


def _pieces(count: int, k: int, queries: int) -> Iterator[slice]:
    """Slices that cover 0 .. count, doubling up to a block's size."""
    start, width, widest = 0, max(1024, 4 * k), max(4 * k, BLOCK // queries)
    while start < count:
        yield slice(start, min(start + width, count))
        start, width = start + width, min(2 * width, widest)


class _Pool(NamedTuple):
    """Candidates: whose they are, where in the gallery, how far. Sorted by (row, value, column)."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def joined(self, *more: np.ndarray) -> _Pool:
        rows, columns, values = (np.concatenate(pair) for pair in zip(self, more, strict=True))
        order = np.lexsort((columns, values, rows))
        return _Pool(rows[order], columns[order], values[order])

    def kept(self, which: np.ndarray) -> _Pool:
        return _Pool(self.rows[which], self.columns[which], self.values[which])

    def places(self, queries: int) -> np.ndarray:
        """Of each candidate: the how-manieth of its row, from 0."""
        first = np.searchsorted(self.rows, np.arange(queries))
        return np.arange(len(self.rows)) - first[self.rows]


def _k_nearest(
    queries: int,
    count: int,
    k: int,
    values_of: Callable[[slice], np.ndarray],
    doubt: Callable[[np.ndarray], np.ndarray] | None = None,
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(values, columns), each Q x min(k, count), ascending, ties by column.

    ``values_of(piece)``: Q x piece. Where these are rounded, ``doubt`` says how far above a row's k-th value another may
    lie and still belong before it, and ``exact(rows, columns)`` measures single pairs.
    """
    k = min(k, count)
    pool = _Pool(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    limit: np.ndarray | None = None
    for piece in _pieces(count, k, queries):
        values = values_of(piece)
        if limit is None:  # a copy: partition in place would mix the columns
            limit = np.partition(values, min(k, values.shape[1]) - 1, axis=1)[:, min(k, values.shape[1]) - 1]
            limit = limit + (doubt(limit) if doubt else 0)
        # In exact values a later column loses every tie, but the first piece has set the limit itself.
        hits = np.flatnonzero(values <= limit[:, None] if doubt or not piece.start else values < limit[:, None])
        rows, columns = np.divmod(hits, values.shape[1])
        pool = pool.joined(rows, columns + piece.start, values.reshape(-1)[hits])
        if exact is not None and len(pool.rows) > POOL:
            pool = _settled(pool, exact)
            pool = pool.kept(pool.places(queries) < k)
        places = pool.places(queries)
        limit = pool.values[places == k - 1]
        if doubt:
            limit = limit + doubt(limit)
            pool = pool.kept(pool.values <= limit[pool.rows])
        else:
            pool = pool.kept(places < k)
    if exact is not None:
        pool = _settled(pool, exact)
        pool = pool.kept(pool.places(queries) < k)
    return pool.values.reshape(queries, k), pool.columns.reshape(queries, k)


def _settled(pool: _Pool, exact: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Pool:
    empty = np.empty(0, np.int64)
    return _Pool(empty, empty, np.empty(0)).joined(pool.rows, pool.columns, exact(pool.rows, pool.columns))


def _by_rows(given: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both a few rows at a time, to fill the second from the first: a list of parts to join would scatter the memory."""
    return zip(given.split(ROWS), out.split(ROWS), strict=True)


def _search(query: Tensor, k: int, of_block: Callable[[Tensor, int], tuple[np.ndarray, np.ndarray]]) -> Any:
    parts = [of_block(block, k) for block in query.split(QUERIES)]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


# ---------------------------------------------------------------------------------------- float
class FloatGallery:
    """Vectors N x D in float32, or float16 in half the memory (what is stored is searched: rounded once, then exact).

    A block's values are |g - c|^2 - 2 (q - c) g with a point c in the midst of the gallery: the squared distance less a
    number that is the same for the row. Rounding then fits the spread of the features, not their distance from the origin.
    """

    def __init__(self, features: Any) -> None:
        given = Features.of(features, "gallery")
        self.vectors = given.given if given.given.dtype is torch.float16 else given.single
        self.longest = float(given.norms.max())
        count, self.dims = self.vectors.shape
        self.centre = self.vectors[:: 1 + count // 256].double().mean(0)
        self.shift = torch.empty(count)
        for part, out in _by_rows(self.vectors, self.shift):
            out[:] = (part.double() - self.centre).square_().sum(1)
        # Errors of a product grow with the root of its length (Higham and Mary, SIAM J. Sci. Comput. 2019); the room is
        # that of autoreid.ranking.
        self.roundings = 8 + math.sqrt(self.dims)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def bytes(self) -> int:
        return self.vectors.nbytes + self.shift.nbytes

    def search(self, query: Any, k: int) -> Found:
        """Raises UserError: other dims, k below 1, numbers that are not finite."""
        _check_k(k)
        given = Features.of(query, "query").single
        _check_dims(given, self.dims)
        squared, indices = _search(given, k, self._block)
        return Found(np.sqrt(squared).astype(np.float32), indices)

    def _block(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances R x k float64 and columns."""
        centred = query.double() - self.centre
        left, lengths = centred.float(), centred.norm(dim=1).numpy()

        def values_of(piece: slice) -> np.ndarray:
            if len(left) == 1:  # on some processors NumPy's library passes a matrix in half the time of PyTorch's
                products = self.vectors[piece].float().numpy() @ left[0].numpy()
                return (self.shift[piece].numpy() - 2 * products)[None]
            return torch.addmm(self.shift[piece], left, self.vectors[piece].float().T, alpha=-2).numpy()

        def doubt(limit: np.ndarray) -> np.ndarray:
            reach = lengths + np.sqrt(np.maximum(limit + lengths * lengths, 0))  # |g - c| of what is as near as that
            factor = np.minimum(reach + float(self.centre.norm()), self.longest)  # |g|, the product's other factor
            error = 2.0**-24 * (2 * self.roundings * lengths * factor + 4 * reach * reach) + 2.0**-125 * self.dims
            return 2 * error  # of the k-th, and of the other

        def exact(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            """Less the same number as ``values_of``, so that a pool may hold both."""
            return self.squared(query, rows, columns) - np.square(lengths)[rows]

        _, columns = _k_nearest(len(query), len(self), k, values_of, doubt, exact)
        rows = np.repeat(np.arange(len(query)), columns.shape[1])
        return self.squared(query, rows, columns.reshape(-1)).reshape(columns.shape), columns

    def squared(self, query: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """P float64: the squared distance of each pair, coordinate by coordinate; equal vectors give equal numbers."""
        left, right = query.numpy(), self.vectors.numpy()
        step, found = max(1, (1 << 20) // self.dims), [np.empty(0)]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            difference = left[rows[part]].astype(np.float64) - right[columns[part]]
            found.append(np.einsum("pd,pd->p", difference, difference))
        return np.concatenate(found)


# ---------------------------------------------------------------------------------------- int8
def scale_of(features: Any) -> float:
    """The scale of symmetric int8 codes: the largest absolute value becomes 127."""
    low, high = Features.of(features, "gallery").given.aminmax()
    largest = max(-float(low), float(high))
    return largest / LARGEST if largest else 1.0


def quantise(features: Any, scale: float) -> Tensor:
    """Codes N x D int8, from -127 to 127: x / scale, rounded (halves to even) and clipped."""
    given = _tensor(features)
    codes = torch.empty(given.shape, dtype=torch.int8)
    for part, out in _by_rows(given, codes):
        out[:] = (part.float() / scale).round().clamp(-LARGEST, LARGEST)
    return codes


def dequantise(codes: Any, scale: float) -> Tensor:
    """N x D float32: what the codes stand for."""
    return _tensor(codes).float() * scale


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))


class Int8Gallery:
    """Codes N x D int8 with one scale: a vector is scale * code. Distances are whole numbers, exact for every D, and the
    squared distance of the vectors is scale^2 times theirs, in the same order."""

    def __init__(self, codes: Any, scale: float) -> None:
        self.codes, self.scale = _tensor(codes), float(scale)
        if self.codes.dtype is not torch.int8 or self.codes.ndim != 2 or 0 in self.codes.shape:
            raise UserError(
                f"int8 codes must be N x D int8 with at least one row, got {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"the scale of int8 codes is {scale}; allowed: a number above 0")
        self.dims = self.codes.shape[1]
        self.wide = torch.int32 if self.dims * 255**2 < 2**31 else torch.int64  # of a squared distance
        self.squares = torch.empty(len(self.codes), dtype=self.wide)
        for part, out in _by_rows(self.codes, self.squares):
            out[:] = self._squares(part)

    @classmethod
    def of(cls, features: Any, scale: float | None = None) -> Int8Gallery:
        """From float vectors; without a scale the largest absolute value sets it."""
        scale = scale_of(features) if scale is None else scale
        return cls(quantise(features, scale), scale)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.squares.nbytes + 4  # the scale, as float32

    def search(self, query: Any, k: int) -> Found:
        """``query``: codes Q x D int8, or vectors, which are coded by the gallery's scale first."""
        squared, indices = self.search_codes(self.coded(query), k)
        return Found((self.scale * np.sqrt(squared, dtype=np.float64)).astype(np.float32), indices)

    def search_codes(self, codes: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The squared distances of codes, Q x k whole numbers, and the indices."""
        _check_k(k)
        return _search(self._query(codes), k, self._block)

    def squared(self, codes: Any) -> Tensor:
        """All squared distances of codes, Q x N int32 (int64 beyond 33,025 dims)."""
        query = self._query(codes)
        return self._squares(query)[:, None] + self._rest(query, slice(None))

    def coded(self, query: Any) -> Tensor:
        query = _tensor(query)
        return query if query.dtype is torch.int8 else quantise(Features.of(query, "query").single, self.scale)

    def _query(self, codes: Any) -> Tensor:
        codes = _tensor(codes)
        if codes.dtype is not torch.int8 or codes.ndim != 2:
            raise UserError(f"query codes must be Q x D int8, got {codes.dtype} {tuple(codes.shape)}")
        _check_dims(codes, self.dims)
        return codes

    def _block(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        rest, columns = _k_nearest(len(query), len(self), k, lambda piece: self._rest(query, piece).numpy())
        return rest.astype(np.int64) + self._squares(query).numpy()[:, None], columns

    def _rest(self, query: Tensor, piece: slice) -> Tensor:
        """|g|^2 - 2 q g: the squared distance less |q|^2."""
        return self.squares[piece] - 2 * integer_product(query, self.codes[piece]).to(self.wide)

    def _squares(self, codes: Tensor) -> Tensor:
        return codes.to(self.wide).square().sum(1, dtype=self.wide)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Q x N int32 (int64 beyond 2^17 dims): the products of all rows of two int8 matrices, exact."""
    if left.shape[1] > 1 << 16:
        parts = zip(left.split(1 << 16, 1), right.split(1 << 16, 1), strict=True)
        return sum((integer_product(a, b).long() for a, b in parts), torch.zeros((), dtype=torch.int64))
    return _product()(left, right)


def product_in_integers(left: Tensor, right: Tensor) -> Tensor:
    """By the processor's int8 instructions, where PyTorch knows them: ten times the float product's speed."""
    return torch._int_mm(left.contiguous(), right.contiguous().T)


def product_in_floats(left: Tensor, right: Tensor, dims: int = 1 << 10) -> Tensor:
    """By float32 products of at most 1,024 dims, whose every partial sum is a whole number of at most 2^24 (128 x 128 x
    1024), which float32 holds exactly."""
    out = torch.zeros(len(left), len(right), dtype=torch.int32)
    for start, piece in ((s, slice(s, s + 2048)) for s in range(0, len(right), 2048)):  # a float copy that fits the cache
        for a, b in zip(left.split(dims, 1), right[piece].split(dims, 1), strict=True):
            out[:, start : start + 2048] += (a.float() @ b.float().T).to(torch.int32)
    return out


@cache
def _product() -> Callable[[Tensor, Tensor], Tensor]:
    """The faster of the two on this machine. Without VNNI some libraries add int8 products up in 16 bits, which the
    extreme codes would overflow, and PyTorch's own loop is slow: so each way is tried once."""
    extreme = torch.tensor([-128, 127], dtype=torch.int8).repeat(64, 32)
    numbers = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64) * 37 % 255 - 127
    times = {}
    for way in (product_in_integers, product_in_floats):
        try:
            same = all(torch.equal(way(a, b).long(), a.long() @ b.long().T)
                       for a in (extreme, numbers.to(torch.int8)) for b in (extreme, -extreme.clamp(min=-127), a))
        except (RuntimeError, AttributeError):  # not in this PyTorch, or not on this processor
            continue
        if same:
            large = extreme.repeat(32, 2)  # 2048 x 128
            way(large[:8], large)
            turns = []
            for _ in range(3):
                begin = time.perf_counter()
                way(large[:8], large)
                turns.append(time.perf_counter() - begin)
            times[way] = min(turns)
    return min(times, key=times.__getitem__)


# ---------------------------------------------------------------------------------------- faiss
def import_faiss() -> Any:
    """faiss, with as many threads as torch. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "this search needs faiss, which is not installed: pip install 'autoreid[gallery]', or search exactly"
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class FaissGallery:
    """A faiss index of vectors by Euclidean distance."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __len__(self) -> int:
        return self.index.ntotal

    @property
    def bytes(self) -> int:
        """Vectors or codes, and the graph."""
        if not hasattr(self.index, "hnsw"):
            return self.index.ntotal * self.index.sa_code_size()
        graph = self.index.hnsw
        links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        return links + self.index.ntotal * self.index.storage.sa_code_size()

    def search(self, query: Any, k: int) -> Found:
        """Approximate, but for the flat index. An index of -1 (with an infinite distance) says that a graph was searched
        to its end and fewer than k were found."""
        _check_k(k)
        given = Features.of(query, "query").single
        _check_dims(given, self.index.d)
        import_faiss()
        if hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = max(HNSW_WIDTH, 2 * k)
        squared, indices = self.index.search(given.contiguous().numpy(), min(k, len(self)))
        return Found(np.where(indices < 0, np.inf, np.sqrt(np.maximum(squared, 0))).astype(np.float32), indices)


def faiss_flat(features: Any) -> FaissGallery:
    """float32 vectors, all compared."""
    vectors = _vectors(features)
    return _filled(import_faiss().IndexFlatL2(vectors.shape[1]), vectors)


def faiss_scalar_quantiser(features: Any) -> FaissGallery:
    """8 bits a dim, each with a range of its own; all compared."""
    faiss, vectors = import_faiss(), _vectors(features)
    return _filled(faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_8bit), vectors)


HNSW_LINKS, HNSW_WIDTH = 32, 128


def faiss_hnsw(features: Any) -> FaissGallery:
    """float32 vectors in a graph of 32 links (Malkov and Yashunin 2018), searched 128 wide: few are compared."""
    vectors = _vectors(features)
    return _filled(import_faiss().IndexHNSWFlat(vectors.shape[1], HNSW_LINKS), vectors)


def _vectors(features: Any) -> np.ndarray:
    return Features.of(features, "gallery").single.contiguous().numpy()


def _filled(index: Any, vectors: np.ndarray) -> FaissGallery:
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    return FaissGallery(index)


# ---------------------------------------------------------------------------------------- side by side
ENGINES: dict[str, Callable[[Any], Gallery]] = {
    "exact": FloatGallery,
    "int8": Int8Gallery.of,
    "faiss-flat": faiss_flat,
    "faiss-sq8": faiss_scalar_quantiser,
    "faiss-hnsw": faiss_hnsw,
}
SINGLES = 100  # queries that are timed one by one


def measure_search(
    engines: Any, query: Any, gallery: Any, k: int, scale: float | None = None
) -> list[dict[str, Any]]:
    """What each engine takes to answer ``query`` (Q x D) from ``gallery`` (N x D), in the order of ``engines``: names of
    ``ENGINES``, or a mapping of names to functions that build a gallery from vectors.

    Rows of ``engine``, ``bytes`` kept in memory, ``build_seconds``, ``ms_per_query`` ("1": the median of up to 100 queries
    one by one; "all": one of three batches of all, per query, the median) and ``recall``: the share of the k exact nearest
    that it finds, or others as near as the k-th to six digits (vectors of codes often tie). ``scale``: of the engine int8,
    where the network was trained with one. On as many threads as torch.
    """
    if not isinstance(engines, Mapping):
        for name in engines:
            if name not in ENGINES:
                raise unknown("search engine", name, ENGINES)
        engines = {name: ENGINES[name] for name in engines}
        if scale is not None and "int8" in engines:
            engines["int8"] = lambda features: Int8Gallery.of(features, scale)
    asking, answering = Features.of(query, "query").single, Features.of(gallery, "gallery").single
    reference = FloatGallery(answering)
    limit = np.square(reference.search(asking, k).distances[:, -1:].astype(np.float64)) * (1 + 1e-6)
    rows = []
    for name, build in engines.items():
        begin = time.perf_counter()
        built = build(answering)
        seconds = time.perf_counter() - begin
        found = built.search(asking, k).indices
        rows_of, there = np.nonzero(found >= 0)  # a graph may find fewer
        near = np.zeros(found.shape, bool)
        near[rows_of, there] = reference.squared(asking, rows_of, found[rows_of, there]) <= limit[rows_of, 0]
        rows.append({
            "engine": name, "bytes": built.bytes, "build_seconds": seconds,
            "ms_per_query": {"1": _milliseconds(built, asking[:SINGLES].split(1), k),
                             "all": _milliseconds(built, [asking] * 3, k) / len(asking)},
            "recall": float(near.mean()),
        })
    return rows


def _milliseconds(gallery: Gallery, queries: Any, k: int) -> float:
    times = []
    for query in queries:
        begin = time.perf_counter()
        gallery.search(query, k)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)

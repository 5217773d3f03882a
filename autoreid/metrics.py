"""CMC, mAP and mINP from features, at about the cost of the query x gallery product itself.

Protocol: Zheng et al., "Scalable Person Re-identification: A Benchmark" (ICCV 2015): images of the query's identity
from the query's own camera are no part of its ranking, identity -1 is no part of any. mINP: Ye et al., "Deep Learning
for Person Re-identification: A Survey and Outlook" (TPAMI 2022), Eq. 2.

All three need only the rank of each positive, and a rank is a count. So the gallery is never sorted: distances are
computed for a block of queries into one reused buffer; per query, only entries up to the farthest positive matter;
these are gathered and sorted as bare values, and the positives looked up among them. Exact ties rank by gallery order.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoreid.errors import UserError, unknown

METRICS = ("euclidean", "cosine")
CMC_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Protocol:
    """Which gallery images are no part of a query's ranking."""

    name: str
    drop_identities: tuple[int, ...] = (-1,)
    remove_same_camera: bool = True


PROTOCOLS: dict[str, Protocol] = {
    "market1501": Protocol("market1501"),
    "veri": Protocol("veri"),
    "plain": Protocol("plain", remove_same_camera=False),  # no cameras: every image of the identity is a match
}


@dataclass(frozen=True)
class RetrievalMetrics:
    """Fractions in [0, 1], means over the ``scored`` of ``total`` queries (the others have no match in the gallery).

    ``mAP`` is the mean of the precision at each hit (every table since 2018); ``mAP_trapezoid`` the authors' MATLAB
    code, the mean of the precisions just before and at each hit (always the smaller); ``mINP`` the number of matches
    over the rank of the last one; ``cmc[k]`` the share of queries with a match among the first k.
    """

    mAP: float
    mAP_trapezoid: float
    mINP: float
    cmc: dict[int, float]
    total: int
    scored: int

    def to_dict(self) -> dict[str, Any]:
        """The plain JSON form, with the ranks of ``cmc`` as strings."""
        return {
            "mAP": self.mAP,
            "mAP_trapezoid": self.mAP_trapezoid,
            "mINP": self.mINP,
            "cmc": {str(rank): value for rank, value in self.cmc.items()},
            "total": self.total,
            "scored": self.scored,
        }


def retrieval_metrics(
    query_features: Any,
    query_identities: Any,
    query_cameras: Any,
    gallery_features: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
    block: int = 256,
) -> RetrievalMetrics:
    """Score a ranking of the gallery (M x D) for each query (N x D); numpy arrays or tensors on any device.

    Identities and cameras are N and M integers; cameras may be None where the protocol does not use them. Memory
    beside the features is two buffers of ``block`` x M floats, whatever N. Raises UserError: unknown protocol or
    metric, shapes that do not fit, numbers that are not finite, no query with a match.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    query, gallery = _features(query_features, "query"), _features(gallery_features, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"query features have {query.shape[1]} dimensions and gallery features {gallery.shape[1]}; "
            "both must come from the same network"
        )
    matches = _Matches.of(
        *_tags(query_identities, query_cameras, len(query), "query"),
        *_tags(gallery_identities, gallery_cameras, len(gallery), "gallery"),
        _protocol(protocol),
    )
    rows = matches.scored()  # queries without a match are not even multiplied
    gallery = gallery.to(query.device)
    scale, shift = _per_gallery_image(gallery, metric, matches.dropped)
    if not torch.isfinite(_squared_norms(query)).all():
        raise _not_finite("query")

    ranks: list[np.ndarray] = []
    buffers = [torch.empty(min(block, max(len(rows), 1)), len(gallery), device=query.device) for _ in range(2)]
    # While the workers rank one block, the product of the next is under way in the other buffer.
    threads = max(1, torch.get_num_threads())
    with ThreadPoolExecutor(threads) as pool:
        pending: list[Any] = []
        for turn, start in enumerate(range(0, len(rows), block)):
            chosen = rows[start : start + block]
            out = buffers[turn % 2][: len(chosen)]
            left = query if len(chosen) == len(query) else query[torch.from_numpy(chosen).to(query.device)]
            if metric == "euclidean":  # |q|^2 is the same for the whole row and changes no rank
                torch.addmm(shift, left, gallery.T, alpha=-2, out=out)
            else:
                torch.addcmul(shift, torch.mm(left, gallery.T, out=out), scale, value=-1, out=out)
            distances = out.cpu().numpy()
            ranks += [rank for future in pending for rank in future.result()]
            shares = np.array_split(np.arange(len(chosen)), threads)
            pending = [pool.submit(_rank_rows, distances, share, chosen, matches) for share in shares if len(share)]
        ranks += [rank for future in pending for rank in future.result()]
    return _from_ranks(ranks, total=len(query))


def metrics_from_distances(
    distances: np.ndarray,
    query_identities: Any,
    query_cameras: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
) -> RetrievalMetrics:
    """The same from any N x M matrix of distances (a re-ranked one, say), which is overwritten with junk as inf."""
    matches = _Matches.of(
        *_tags(query_identities, query_cameras, distances.shape[0], "query"),
        *_tags(gallery_identities, gallery_cameras, distances.shape[1], "gallery"),
        _protocol(protocol),
    )
    distances[:, matches.dropped] = np.inf
    rows = matches.scored()
    return _from_ranks(_rank_rows(distances, rows, np.arange(len(distances)), matches), total=len(distances))


class _Matches(NamedTuple):
    """Per query, who in the gallery is a match and who is junk, as ranges of one sorted list."""

    order: np.ndarray  # M: gallery indices sorted by identity, within it by camera, within that ascending
    first: np.ndarray  # N: where the query's identity starts in order
    last: np.ndarray  # N: and where it ends
    junk_first: np.ndarray  # N: where its own camera starts in there (an empty range if the protocol keeps it)
    junk_last: np.ndarray  # N: and where it ends
    dropped: np.ndarray  # gallery indices that are no part of any ranking

    @classmethod
    def of(
        cls,
        query_ids: np.ndarray,
        query_cams: np.ndarray | None,
        gallery_ids: np.ndarray,
        gallery_cams: np.ndarray | None,
        protocol: Protocol,
    ) -> _Matches:
        count = len(query_ids)
        if not protocol.remove_same_camera:  # as if no image were from the query's camera
            query_cams, gallery_cams = np.ones(count, int), np.zeros(len(gallery_ids), int)
        elif query_cams is None or gallery_cams is None:
            raise UserError(f"protocol '{protocol.name}' needs cameras; give them, or use --protocol plain")
        # Dense numbers, so that identity and camera fit in one sortable key whatever the user's numbers are.
        _, ids = np.unique(np.concatenate([query_ids, gallery_ids]), return_inverse=True)
        cameras, cams = np.unique(np.concatenate([query_cams, gallery_cams]), return_inverse=True)
        key = ids * len(cameras) + cams
        order = np.argsort(key[count:], kind="stable")
        sorted_ids, sorted_keys = ids[count:][order], key[count:][order]
        nobody = np.isin(query_ids, protocol.drop_identities)
        first = np.searchsorted(sorted_ids, ids[:count], "left")
        last = np.where(nobody, first, np.searchsorted(sorted_ids, ids[:count], "right"))
        junk_first = np.where(nobody, first, np.searchsorted(sorted_keys, key[:count], "left"))
        junk_last = np.where(nobody, first, np.searchsorted(sorted_keys, key[:count], "right"))
        dropped = np.flatnonzero(np.isin(gallery_ids, protocol.drop_identities))
        return cls(order, first, last, junk_first, junk_last, dropped)

    def scored(self) -> np.ndarray:
        """The queries with at least one positive."""
        return np.flatnonzero(self.last - self.first > self.junk_last - self.junk_first)

    def of_query(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Query i's positives and its junk (same identity, same camera), as gallery indices."""
        first, junk_first, junk_last, last = self.first[i], self.junk_first[i], self.junk_last[i], self.last[i]
        positives = np.concatenate([self.order[first:junk_first], self.order[junk_last:last]])
        return positives, self.order[junk_first:junk_last]


def _rank_rows(distances: np.ndarray, rows: np.ndarray, queries: np.ndarray, matches: _Matches) -> list[np.ndarray]:
    """For each of these rows, the ascending 1-based ranks of its positives; row r belongs to query ``queries[r]``."""
    ranks = []
    for r in rows:
        row = distances[r]
        positives, junk = matches.of_query(queries[r])
        row[junk] = np.inf
        wanted = row[positives]
        nearer = row.compress(row <= wanted.max())
        nearer.sort()
        wanted_sorted = np.sort(wanted)
        rank = nearer.searchsorted(wanted_sorted, "left") + 1
        upto = nearer.searchsorted(wanted_sorted, "right")
        if (upto > rank).any():  # somebody at exactly the same distance: count those earlier in the gallery
            order = np.lexsort((positives, wanted))
            for k in np.flatnonzero(upto > rank):
                column = positives[order[k]]
                rank[k] += np.count_nonzero(row[:column] == row[column])
        ranks.append(rank)
    return ranks


def _from_ranks(ranks: list[np.ndarray], total: int) -> RetrievalMetrics:
    """The means over queries, from the ascending ranks of each scored query's positives."""
    if not ranks:
        raise UserError(
            f"none of the {total} queries has a gallery image of its identity from another camera, so nothing can be "
            "scored; usually all cameras are equal: give the true cameras, or use --protocol plain to ignore them"
        )
    counts = np.array([len(rank) for rank in ranks])
    starts = np.cumsum(counts) - counts
    rank = np.concatenate(ranks).astype(np.float64)
    hit = np.arange(len(rank)) - np.repeat(starts, counts) + 1.0  # 1, 2, ... within each query
    at = hit / rank
    # Just before the k-th hit, k - 1 of rank - 1 were right; before the very first place it counts as 1.
    before = np.where(rank > 1, (hit - 1) / np.maximum(rank - 1, 1), 1.0)
    first = rank[starts]
    return RetrievalMetrics(
        mAP=float((np.add.reduceat(at, starts) / counts).mean()),
        mAP_trapezoid=float((np.add.reduceat((before + at) / 2, starts) / counts).mean()),
        mINP=float((counts / rank[starts + counts - 1]).mean()),
        cmc={k: float((first <= k).mean()) for k in CMC_RANKS},
        total=total,
        scored=len(ranks),
    )


def _per_gallery_image(gallery: Tensor, metric: str, dropped: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the product is scaled by (cosine) and shifted by; a shift of inf keeps dropped images out of every rank."""
    squared = _squared_norms(gallery)
    if not torch.isfinite(squared).all():
        raise _not_finite("gallery")
    shift = squared.clone() if metric == "euclidean" else torch.zeros_like(squared)
    shift[torch.from_numpy(dropped).to(shift.device)] = torch.inf
    return squared.sqrt().clamp(min=1e-12).reciprocal(), shift


def _squared_norms(features: Tensor) -> Tensor:
    """|x|^2 per row, a few thousand rows at a time: no second copy of the features."""
    return torch.cat([part.square().sum(1) for part in features.split(4096)])


def _not_finite(side: str) -> UserError:
    return UserError(
        f"{side} features hold NaN or infinite numbers; the network diverged or was fed such images: "
        "extract them again from a good checkpoint"
    )


def _protocol(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    return PROTOCOLS[protocol]


def _features(features: Any, side: str) -> Tensor:
    """N x D float32, as a view where it already is."""
    if not isinstance(features, Tensor):
        features = np.asarray(features)
        if features.dtype.kind not in "fiu":
            raise UserError(f"{side} features must be numbers (N x D floats), got dtype {features.dtype}")
        features = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(
            f"{side} features must be N x D with at least one row, got shape {tuple(features.shape)}; "
            "store one row per image"
        )
    return features.detach().float()


def _tags(identities: Any, cameras: Any, count: int, side: str) -> tuple[np.ndarray, np.ndarray | None]:
    return _integers(identities, count, side, "identities"), (
        None if cameras is None else _integers(cameras, count, side, "cameras")
    )


def _integers(values: Any, count: int, side: str, what: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise UserError(
            f"{side} {what} must be {count} integers, one per feature row, got shape {array.shape} of {array.dtype}"
        )
    return array.astype(np.int64)


def score(
    query_npz: str | os.PathLike[str],
    gallery_npz: str | os.PathLike[str],
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
) -> RetrievalMetrics:
    """Metrics of features made by anything: two .npz files with ``features``, ``identities`` and ``cameras``.

    ``features`` N x D floats, the others N integers; ``cameras`` may be missing for ``--protocol plain``.
    Raises UserError: a file or array is missing, shapes do not fit, numbers are not finite.
    """
    protocol = _protocol(protocol)
    sides = []
    for path in (query_npz, gallery_npz):
        names: Sequence[str] = ("features", "identities", "cameras")
        stored = _read_npz(path)
        for name in names if protocol.remove_same_camera else names[:2]:
            if name not in stored:
                cure = "store it, or use --protocol plain to ignore cameras" if name == "cameras" else "store it"
                held = ", ".join(sorted(stored)) or "nothing"
                raise UserError(f"{path} has no array '{name}' (it holds {held}); {cure}")
        sides.append((stored["features"], stored["identities"], stored.get("cameras")))
    return retrieval_metrics(*sides[0], *sides[1], protocol=protocol, metric=metric)


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    wanted = "an .npz with features (N x D), identities (N) and cameras (N), as numpy.savez writes"
    if not os.path.isfile(path):
        raise UserError(f"no file {path}; give {wanted}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as arrays of numbers; give {wanted}") from error

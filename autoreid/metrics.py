"""CMC, mAP and mINP under a named protocol, from features or from distances.

CMC and mAP: Zheng et al., "Scalable Person Re-identification: A Benchmark" (ICCV 2015). mINP: Ye et al., "Deep Learning
for Person Re-identification: A Survey and Outlook" (TPAMI 2022), Eq. 2. All are functions of the ranks of each query's
positives, which ``autoreid.ranking`` finds; who is a positive, ``autoreid.protocols`` says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autoreid.errors import UserError, unknown
from autoreid.protocols import PROTOCOLS, Protocol, Tags, find_draws, find_protocol, not_one_list, nothing_scored
from autoreid.ranking import MEMORY, Features, rank_rows, ranks_of_features
from autoreid.rerank import reranked_blocks

__all__ = [
    "PROTOCOLS", "Protocol", "RetrievalMetrics", "find_protocol", "metrics_from_blocks", "metrics_from_distances",
    "metrics_from_ranks", "retrieval_metrics", "score",
]  # fmt: skip

METRICS = ("euclidean", "cosine")
DENOMINATORS = ("scored", "all")
CMC_RANKS = (1, 5, 10, 20)


@dataclass(frozen=True)
class RetrievalMetrics:
    """Fractions in [0, 1]: means over queries, and where the gallery is drawn over ``repeats`` draws.

    ``mAP`` is the mean of the precision at each hit (every table since 2018); ``mAP_trapezoid`` the authors' MATLAB
    code, the mean of the precisions just before and at each hit (never the larger); ``mINP`` the number of matches
    over the rank of the last one; ``cmc[k]`` the share of queries with a match among the first k.

    ``scored`` of ``total`` queries have features and a match in the gallery (of one draw; all together where they differ).
    ``denominator`` "scored" leaves the others out of the means, as torchreid and fast-reid do; "all" counts each as
    zero, as the MATLAB code does. ``std`` holds the standard deviations (n - 1) over the draws; None without draws.
    """

    mAP: float
    mAP_trapezoid: float
    mINP: float
    cmc: dict[int, float]
    total: int
    scored: int
    protocol: str
    denominator: str = "scored"
    repeats: int = 1
    std: dict[str, Any] | None = None
    unreadable: int = 0  # images that were left out because they could not be read

    def to_dict(self) -> dict[str, Any]:
        """The plain JSON form, with the ranks of ``cmc`` as strings."""
        plain = {**vars(self), "cmc": _named(self.cmc)}
        if self.std is not None:
            plain["std"] = {**self.std, "cmc": _named(self.std["cmc"])}
        return plain


def _named(cmc: dict[int, float]) -> dict[str, float]:
    return {str(rank): value for rank, value in cmc.items()}


def retrieval_metrics(
    query_features: Any,
    query_identities: Any,
    query_cameras: Any,
    gallery_features: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
    memory: int = MEMORY,
    denominator: str = "scored",
    rerank: tuple[int, int, float] | None = None,
    pictures: tuple[Any, Any] | None = None,
    lost: int = 0,
) -> RetrievalMetrics:
    """Score a ranking of the gallery (M x D) for each query (N x D); numpy arrays or tensors on any device.

    Identities and cameras are N and M integers; cameras may be None where the protocol does not use them. Blocks of
    distances take ``memory`` bytes whatever N and M; features that are not float32 are also copied once as such.
    ``rerank`` (k1, k2, lambda) ranks by ``rerank.reranked_blocks`` instead. ``pictures``, N and M integers: see
    ``protocols.Tags``. ``lost`` queries have no features (an image that cannot be read) and count in ``total`` alone.
    Raises UserError: unknown protocol, metric or denominator, shapes that do not fit, numbers that are not finite, no
    query with a match.
    """
    rule = _check(protocol, denominator)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    query, gallery = Features.of(query_features, "query"), Features.of(gallery_features, "gallery")
    if query.single.shape[1] != gallery.single.shape[1]:
        raise UserError(
            f"query features have {query.single.shape[1]} dimensions and gallery features {gallery.single.shape[1]}; "
            "both must come from the same network"
        )
    ours, theirs = pictures or (None, None)
    query_tags = Tags.of(query_identities, query_cameras, len(query.single), "query", ours)
    gallery_tags = Tags.of(gallery_identities, gallery_cameras, len(gallery.single), "gallery", theirs)
    if rerank is not None:
        blocks = reranked_blocks(query.given, gallery.given, *rerank, metric=metric, memory=memory)
        return _from_blocks(blocks, query_tags, gallery_tags, rule, denominator, lost)
    gallery = gallery.to(query.single.device)
    if rule.one_per_identity and not torch.equal(query.single, gallery.single):
        raise not_one_list(rule)
    ranks = [
        [rank for part in draw for rank in ranks_of_features(query, gallery, metric, part, memory)]
        for draw in find_draws(query_tags, gallery_tags, rule)
    ]
    return metrics_from_ranks(ranks, query_tags, gallery_tags, rule, denominator, lost)


def metrics_from_blocks(
    blocks: Iterable[tuple[int, Any]],
    query_identities: Any,
    query_cameras: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
    denominator: str = "scored",
) -> RetrievalMetrics:
    """The same from distances, block by block: ``(start, B x M)`` holds the rows of the queries from ``start`` on.

    Each query is in one block. Equal distances tie, by gallery order; inf ranks last. The blocks are left as they were.
    """
    rule = _check(protocol, denominator)
    query_tags = Tags.of(query_identities, query_cameras, None, "query")
    gallery_tags = Tags.of(gallery_identities, gallery_cameras, None, "gallery")
    return _from_blocks(blocks, query_tags, gallery_tags, rule, denominator)


def _from_blocks(
    blocks: Iterable[tuple[int, Any]], query_tags: Tags, gallery_tags: Tags, rule: Protocol, denominator: str, lost: int = 0
) -> RetrievalMetrics:
    draws = find_draws(query_tags, gallery_tags, rule)
    ranks: list[list[np.ndarray]] = [[] for _ in draws]
    times_seen = np.zeros(query_tags.total, int)
    for start, given in blocks:
        block = _block(given, start, query_tags.total, gallery_tags.total)
        times_seen[start : start + len(block)] += 1
        for found, draw in zip(ranks, draws, strict=True):
            for part in draw:
                rows = part.matches.scored()
                at = part.queries[rows] - start
                inside = (at >= 0) & (at < len(block))
                chosen = block[at[inside]][:, part.gallery]  # a copy
                chosen[:, part.matches.dropped] = np.nan
                found += rank_rows(chosen, rows[inside], part.matches)
    if (times_seen != 1).any():
        q = int(np.flatnonzero(times_seen != 1)[0])
        raise UserError(
            f"query {q} of {query_tags.total} has {times_seen[q]} rows of distances, must have 1; give each query's "
            "distances once"
        )
    return metrics_from_ranks(ranks, query_tags, gallery_tags, rule, denominator, lost)


def metrics_from_distances(
    distances: Any,
    query_identities: Any,
    query_cameras: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
    denominator: str = "scored",
) -> RetrievalMetrics:
    """The same from an N x M matrix of distances (a re-ranked one, say), which is left as it was."""
    whole = distances if hasattr(distances, "__array__") else np.asarray(distances)
    blocks = ((start, whole[start : start + 256]) for start in range(0, len(whole), 256))
    return metrics_from_blocks(
        blocks, query_identities, query_cameras, gallery_identities, gallery_cameras, protocol, denominator
    )


def _check(protocol: str | Protocol, denominator: str) -> Protocol:
    if denominator not in DENOMINATORS:
        raise unknown("denominator", denominator, DENOMINATORS)
    return find_protocol(protocol)


def _block(given: Any, start: int, queries: int, gallery: int) -> np.ndarray:
    """B x M floats of distances."""
    block = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if block.ndim != 2 or block.shape[1] != gallery or start + len(block) > queries or block.dtype.kind not in "fiu":
        raise UserError(
            f"distances must be numbers, a row for each of {queries} queries and a column for each of {gallery} gallery "
            f"images, got shape {block.shape} of {block.dtype}" + (f" from row {start} on" if start else "")
        )
    if block.dtype.kind != "f":
        block = block.astype(np.float64)
    bad = np.isnan(block).any(1)
    if bad.any():
        raise UserError(
            f"distances hold NaN in row {start + int(bad.argmax())}, counting from 0; check the features that they come "
            "from, and mark what must rank last with inf"
        )
    return block


def metrics_from_ranks(
    ranks: Sequence[Sequence[np.ndarray]],
    query: Tags,
    gallery: Tags,
    protocol: Protocol,
    denominator: str = "scored",
    lost: int = 0,
) -> RetrievalMetrics:
    """The metrics from each draw's list of ascending ranks (``ranking.ranks_of_features``), one array per scored query."""
    if not ranks[0]:  # who has a match does not depend on the draw
        raise nothing_scored(query, gallery, protocol)
    total, scored = query.total + lost, len(ranks[0])
    if protocol.one_per_identity:  # what is drawn does not ask
        total -= len(np.setdiff1d(query.identities, protocol.drop_identities))
    draws = np.array([_from_ranks(found, total if denominator == "all" else scored) for found in ranks])
    means = _by_name(draws.mean(0))
    std = _by_name(draws.std(0, ddof=1)) if len(draws) > 1 else None
    return RetrievalMetrics(
        **means, total=total, scored=scored, protocol=protocol.name, denominator=denominator, repeats=len(draws), std=std
    )


def _from_ranks(ranks: Sequence[np.ndarray], queries: int) -> list[float]:
    """mAP, mAP_trapezoid, mINP and CMC, as sums over scored queries divided by ``queries``."""
    counts = np.array([len(rank) for rank in ranks])
    starts = np.cumsum(counts) - counts
    rank = np.concatenate(ranks).astype(np.float64)
    hit = np.arange(len(rank)) - np.repeat(starts, counts) + 1.0  # 1, 2, ... within each query
    at = hit / rank
    # Just before the k-th hit, k - 1 of rank - 1 were right; before the very first place it counts as 1.
    before = np.where(rank > 1, (hit - 1) / np.maximum(rank - 1, 1), 1.0)
    step = np.add.reduceat(at, starts) / counts
    trapezoid = np.add.reduceat((before + at) / 2, starts) / counts
    inverse_penalty = counts / rank[starts + counts - 1]
    first = [rank[starts] <= k for k in CMC_RANKS]
    return [float(values.sum() / queries) for values in (step, trapezoid, inverse_penalty, *first)]


def _by_name(values: np.ndarray) -> dict[str, Any]:
    mean_ap, trapezoid, inverse_penalty, *cmc = (float(value) for value in values)
    return {
        "mAP": mean_ap, "mAP_trapezoid": trapezoid, "mINP": inverse_penalty, "cmc": dict(zip(CMC_RANKS, cmc))
    }  # fmt: skip


def score(
    query_npz: str | os.PathLike[str],
    gallery_npz: str | os.PathLike[str],
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
    denominator: str = "scored",
    rerank: tuple[int, int, float] | None = None,
) -> RetrievalMetrics:
    """Metrics of features made by anything: two .npz files with ``features``, ``identities`` and ``cameras``.

    ``features`` N x D floats, the others N integers; ``cameras`` may be missing where the protocol does not use them
    (``plain``, ``vehicleid/...``: there the same file is query and gallery). Raises UserError: a file or array is
    missing, shapes do not fit, numbers are not finite.
    """
    rule = find_protocol(protocol)
    sides = []
    for path in (query_npz, gallery_npz):
        names: Sequence[str] = ("features", "identities", "cameras")
        stored = _read_npz(path)
        for name in names if rule.remove_same_camera else names[:2]:
            if name not in stored:
                cure = "store it, or use --protocol plain to ignore cameras" if name == "cameras" else "store it"
                held = ", ".join(sorted(stored)) or "nothing"
                raise UserError(f"{path} has no array '{name}' (it holds {held}); {cure}")
        sides.append((stored["features"], stored["identities"], stored.get("cameras")))
    return retrieval_metrics(*sides[0], *sides[1], protocol=rule, metric=metric, denominator=denominator, rerank=rerank)


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    wanted = "an .npz with features (N x D), identities (N) and cameras (N), as numpy.savez writes"
    if not os.path.isfile(path):
        raise UserError(f"no file {path}; give {wanted}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # what is damaged shows itself as zlib's, lzma's, zipfile's, numpy's, ...
        raise UserError(f"{path} cannot be read as arrays of numbers; give {wanted}") from error

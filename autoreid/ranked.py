"""Ranked lists for people to look at: a query, and what the gallery answers first, each image marked.

A mean over queries hides what goes wrong; the worst lists show it (another person in the same coat, a box cut in half,
a wrong label).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from autoreid.errors import UserError
from autoreid.protocols import Protocol, Tags, find_draws, find_protocol
from autoreid.ranking import Features, rank_rows, ranks_of_features
from autoreid.rerank import reranked_blocks

MATCH, WRONG, JUNK = "match", "wrong", "junk"


class RankedList(NamedTuple):
    """The first gallery images of one query, nearest first; junk is shown where it stands, though it has no rank."""

    query: int
    average_precision: float | None  # None: no match in the gallery, not scored
    gallery: tuple[int, ...]
    kinds: tuple[str, ...]  # MATCH, WRONG or JUNK, one per image
    distances: tuple[float, ...]


def ranked_lists(
    query_features: Any,
    query_identities: Any,
    query_cameras: Any,
    gallery_features: Any,
    gallery_identities: Any,
    gallery_cameras: Any,
    protocol: str | Protocol = "market1501",
    queries: Sequence[int] | None = None,
    count: int = 8,
    depth: int = 10,
    rerank: tuple[int, int, float] | None = None,
    pictures: tuple[Any, Any] | None = None,
) -> list[RankedList]:
    """The lists of these ``queries``, or of the ``count`` with the lowest average precision, the worst first.

    Euclidean distance or, with ``rerank``, the re-ranked one; arguments as ``metrics.retrieval_metrics``, whose mAP is the
    mean of these precisions over all queries. Raises UserError: as there, and as :func:`one_list`; a query that does not
    exist, count or depth below 1.
    """
    rule = one_list(protocol)
    if count < 1 or depth < 1:
        raise UserError(f"ranked lists: count={count}, depth={depth}; allowed is 1 or more each")
    query, gallery = Features.of(query_features, "query"), Features.of(gallery_features, "gallery")
    gallery = gallery.to(query.single.device)
    if wrong := [q for q in queries or () if not 0 <= q < len(query.single)]:
        raise UserError(f"there is no query {wrong[0]}; allowed is 0 to {len(query.single) - 1}")
    ours, theirs = pictures or (None, None)
    query_tags = Tags.of(query_identities, query_cameras, len(query.single), "query", ours)
    gallery_tags = Tags.of(gallery_identities, gallery_cameras, len(gallery.single), "gallery", theirs)
    [[part]] = find_draws(query_tags, gallery_tags, rule)
    scored = part.matches.scored()
    first: dict[int, _Nearest] = {}
    if rerank is None:
        ranks = ranks_of_features(query, gallery, "euclidean", part)
    else:  # a row of distances is there once, when nobody knows yet who is among the worst
        ranks = []
        for start, block in reranked_blocks(query.given, gallery.given, *rerank):
            here = range(start, start + len(block))
            first |= {q: _nearest(block[q - start], depth) for q in (here if queries is None else queries) if q in here}
            rows = scored[(scored >= start) & (scored < here.stop)]
            block[:, part.matches.dropped] = np.nan
            ranks += rank_rows(block[rows - start], rows, part.matches)
    precision = {int(q): float(np.mean(np.arange(1, len(r) + 1) / r)) for q, r in zip(scored, ranks, strict=True)}
    if queries is None:
        queries = sorted(precision, key=lambda q: (precision[q], q))[:count]
    if rerank is None:
        right = gallery.single.double()
        first = {q: _nearest((right - query.single[q].double()).norm(dim=1).cpu().numpy(), depth) for q in queries}
    lists = []
    for q in queries:
        positives, junk = part.matches.of_query(q)
        kinds = np.full(len(gallery.single), WRONG, dtype=object)
        kinds[positives], kinds[junk], kinds[part.matches.dropped] = MATCH, JUNK, JUNK
        columns, distances = first[q]
        lists.append(RankedList(
            int(q), precision.get(int(q)), tuple(map(int, columns)), tuple(kinds[columns]), tuple(map(float, distances))
        ))
    return lists


_Nearest = tuple[np.ndarray, np.ndarray]  # gallery indices, distances


def _nearest(row: np.ndarray, depth: int) -> _Nearest:
    """The ``depth`` nearest of a row of distances, ties by gallery order."""
    within = row <= np.partition(row, min(depth, len(row)) - 1)[min(depth, len(row)) - 1]
    columns = np.flatnonzero(within)
    columns = columns[np.argsort(row[columns], kind="stable")][:depth]
    return columns, row[columns]


def one_list(protocol: str | Protocol) -> Protocol:
    """The protocol of that name. Raises UserError where it draws its gallery: a list belongs to one gallery."""
    rule = find_protocol(protocol)
    if rule.drawn:
        raise UserError(
            f"protocol '{rule.name}' draws its gallery, so a query has no one list; leave the ranked lists out, or use "
            "--protocol plain, where the whole gallery answers"
        )
    return rule

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
from autoreid.ranking import Features, ranks_of_features

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
) -> list[RankedList]:
    """The lists of these ``queries``, or of the ``count`` with the lowest average precision, the worst first.

    Euclidean distance; arguments as ``metrics.retrieval_metrics``. Raises UserError: as there, a protocol that draws its
    gallery (a list belongs to one gallery), a query that does not exist, count or depth below 1.
    """
    rule = find_protocol(protocol)
    if rule.drawn:
        raise UserError(f"protocol '{rule.name}' draws its gallery, so a query has no one list; use --protocol plain")
    if count < 1 or depth < 1:
        raise UserError(f"ranked lists: count={count}, depth={depth}; allowed is 1 or more each")
    query, gallery = Features.of(query_features, "query"), Features.of(gallery_features, "gallery")
    query_tags = Tags.of(query_identities, query_cameras, len(query.single), "query")
    gallery_tags = Tags.of(gallery_identities, gallery_cameras, len(gallery.single), "gallery")
    [[part]] = find_draws(query_tags, gallery_tags, rule)
    scored = part.matches.scored()
    ranks = ranks_of_features(query, gallery, "euclidean", part)
    precision = {int(q): float(np.mean(np.arange(1, len(r) + 1) / r)) for q, r in zip(scored, ranks, strict=True)}
    if queries is None:
        queries = sorted(precision, key=lambda q: (precision[q], q))[:count]
    if wrong := [q for q in queries if not 0 <= q < len(query.single)]:
        raise UserError(f"there is no query {wrong[0]}; allowed is 0 to {len(query.single) - 1}")
    dropped = np.zeros(len(gallery.single), bool)
    dropped[part.matches.dropped] = True
    lists = []
    for q in queries:
        positives, junk = part.matches.of_query(q)
        kinds = np.full(len(dropped), WRONG, dtype=object)
        kinds[positives], kinds[junk], kinds[dropped] = MATCH, JUNK, JUNK
        distances = np.linalg.norm((gallery.single - query.single[q]).double().cpu().numpy(), axis=1)
        first = np.argsort(distances, kind="stable")[:depth]
        lists.append(RankedList(
            int(q), precision.get(int(q)), tuple(map(int, first)), tuple(kinds[first]), tuple(map(float, distances[first]))
        ))
    return lists

"""Protocols: who is whose match, who is left out of whose ranking, and which galleries are drawn. No torch.

The rule of Zheng et al., "Scalable Person Re-identification: A Benchmark" (ICCV 2015): images of the query's identity
from the query's own camera are no part of its ranking, identity -1 is no part of any. What the others add stands at
their line in ``PROTOCOLS``; a result records the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autoreid.errors import UserError, unknown


@dataclass(frozen=True)
class Protocol:
    """Which gallery images are no part of a query's ranking, and whether the gallery is drawn.

    ``single_shot``: each draw's gallery is one random image per identity, from another camera than the query's.
    ``one_per_identity``: query and gallery are one list of all test images; each draw takes one random image per
    identity as gallery, and the rest ask.
    """

    name: str
    drop_identities: tuple[int, ...] = (-1,)
    remove_same_camera: bool = True
    single_shot: bool = False
    one_per_identity: bool = False
    draws: int = 10  # where the gallery is drawn

    @property
    def drawn(self) -> bool:
        return self.single_shot or self.one_per_identity


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("market1501"),
        Protocol("msmt17"),  # Wei et al., CVPR 2018
        Protocol("cuhk03-np"),  # Zhong et al., CVPR 2017: 767 / 700 identities, scored as Market-1501 is
        # Li et al., CVPR 2014: 20 splits of 1,367 / 100 identities. The literature reports CMC alone here, no mAP.
        Protocol("cuhk03-classic", single_shot=True),
        Protocol("veri"),  # Liu et al., ECCV 2016; gt_index.txt and jk_index.txt list the same pairs one by one
        # Liu et al., CVPR 2016: no cameras; 10 draws, of which are reported.
        *(
            Protocol(f"vehicleid/test-{identities}", remove_same_camera=False, one_per_identity=True)
            for identities in (800, 1600, 2400, 3200, 6000, 13164)
        ),
        Protocol("vric"),  # Kanaci et al., GCPR 2018: one probe and one gallery image each, so mAP is the mean of 1/rank
        Protocol("veri-wild"),  # Lou et al., CVPR 2019
        Protocol("mars"),  # Zheng et al., ECCV 2016: the gallery holds the query tracks too; their cameras exclude them
        Protocol("plain", remove_same_camera=False),  # no cameras: every image of the identity is a match
    )
}


def find_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of that name, or the given one. Raises UserError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    return PROTOCOLS[protocol]


class Tags(NamedTuple):
    """Whom the images of one side show, and which camera took them.

    ``pictures`` (``data.picture_numbers``) has one number on both sides where a query lies in the gallery too. A rule
    that looks at cameras needs none: a picture's own camera leaves it out of its ranking.
    """

    identities: np.ndarray
    cameras: np.ndarray | None
    pictures: np.ndarray | None = None

    @classmethod
    def of(cls, identities: Any, cameras: Any, count: int | None, side: str, pictures: Any = None) -> Tags:
        """From anything array-like; ``count`` feature rows where they are known. Raises UserError if not integers."""
        ids = _integers(identities, count, side, "identities")
        given = {"cameras": cameras, "pictures": pictures}
        return cls(ids, *(None if v is None else _integers(v, len(ids), side, what) for what, v in given.items()))

    def take(self, index: np.ndarray) -> Tags:
        return Tags(self.identities[index], *(None if values is None else values[index] for values in self[1:]))

    @property
    def total(self) -> int:
        return len(self.identities)


def _integers(values: Any, count: int | None, side: str, what: str) -> np.ndarray:
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except ValueError as error:
        raise UserError(f"{side} {what} must be a flat list of integers, one per feature row") from error
    if array.size == 0:
        raise UserError(
            f"there are no {side} images ({side} {what} are empty); check the dataset, or the file they are from"
        )
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != (len(array) if count is None else count):
        number = "integers" if count is None else f"{count} integers"
        cure = f"; store them as {what}.astype('int64')" if array.dtype.kind == "f" else ""
        raise UserError(
            f"{side} {what} must be {number}, one per feature row, got shape {array.shape} of {array.dtype}{cure}"
        )
    return array.astype(np.int64)


class Matches(NamedTuple):
    """Per query, who in the gallery is a match and who is junk, as ranges of one sorted list."""

    order: np.ndarray  # M: gallery indices sorted by identity, within it by camera, within that ascending
    first: np.ndarray  # N: where the query's identity starts in order
    last: np.ndarray  # N: and where it ends
    junk_first: np.ndarray  # N: where its own camera starts in there (an empty range if the protocol keeps it)
    junk_last: np.ndarray  # N: and where it ends
    dropped: np.ndarray  # gallery indices that are no part of any ranking

    def scored(self) -> np.ndarray:
        """The queries with at least one positive."""
        return np.flatnonzero(self.last - self.first > self.junk_last - self.junk_first)

    def of_query(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Query i's positives and its junk (same identity, same camera), as gallery indices."""
        first, junk_first, junk_last, last = self.first[i], self.junk_first[i], self.junk_last[i], self.last[i]
        positives = np.concatenate([self.order[first:junk_first], self.order[junk_last:last]])
        return positives, self.order[junk_first:junk_last]


def find_matches(query: Tags, gallery: Tags, protocol: Protocol) -> Matches:
    """Positives and junk of every query in this gallery. Raises UserError where the rule needs cameras and has none."""
    if protocol.remove_same_camera:
        query_cams, gallery_cams = _cameras(query, protocol), _cameras(gallery, protocol)
    elif query.pictures is not None and gallery.pictures is not None:  # a picture's only camera is itself
        query_cams, gallery_cams = query.pictures, gallery.pictures
    else:  # as if no image were from the query's camera
        query_cams, gallery_cams = np.ones(query.total, int), np.zeros(gallery.total, int)
    # Dense numbers, so that identity and camera fit in one sortable key whatever the user's numbers are.
    _, ids = np.unique(np.concatenate([query.identities, gallery.identities]), return_inverse=True)
    cameras, cams = np.unique(np.concatenate([query_cams, gallery_cams]), return_inverse=True)
    key = ids * len(cameras) + cams
    asks, answers = slice(None, query.total), slice(query.total, None)
    order = np.argsort(key[answers], kind="stable")
    sorted_ids, sorted_keys = ids[answers][order], key[answers][order]
    nobody = np.isin(query.identities, protocol.drop_identities)
    first = np.searchsorted(sorted_ids, ids[asks], "left")
    last = np.where(nobody, first, np.searchsorted(sorted_ids, ids[asks], "right"))
    junk_first = np.where(nobody, first, np.searchsorted(sorted_keys, key[asks], "left"))
    junk_last = np.where(nobody, first, np.searchsorted(sorted_keys, key[asks], "right"))
    dropped = np.flatnonzero(np.isin(gallery.identities, protocol.drop_identities))
    return Matches(order, first, last, junk_first, junk_last, dropped)


def _cameras(tags: Tags, protocol: Protocol) -> np.ndarray:
    if tags.cameras is None:
        raise UserError(f"protocol '{protocol.name}' needs cameras; give them, or use --protocol plain")
    return tags.cameras


def one_camera(query: Tags, gallery: Tags, protocol: Protocol) -> str:
    """A line where one camera took every answer and that leaves some queries without a match, else nothing.

    To be said also of figures that could be computed: they are of the other queries alone.
    """
    if not protocol.remove_same_camera:
        return ""
    answers = np.isin(gallery.identities, query.identities) & ~np.isin(gallery.identities, protocol.drop_identities)
    cameras = np.unique(_cameras(gallery, protocol)[answers])
    if len(cameras) != 1:
        return ""
    answered = np.isin(query.identities, gallery.identities[answers])
    lost = answered & (_cameras(query, protocol) == cameras[0])
    if not lost.any():
        return ""
    scored = "nothing" if lost.sum() == answered.sum() else f"only {answered.sum() - lost.sum()} of {query.total} queries"
    return (
        f"every gallery image of the queries' identities has camera {cameras[0]}, and protocol '{protocol.name}' leaves "
        f"out what the query's own camera took, so {scored} can be scored; give the true cameras, or use --protocol plain "
        "to ignore them"
    )


class Part(NamedTuple):
    """Some queries, the gallery that they rank, and the matches among the two (counted within them)."""

    queries: np.ndarray
    gallery: np.ndarray | slice
    matches: Matches


def find_draws(query: Tags, gallery: Tags, protocol: Protocol) -> list[list[Part]]:
    """The parts to be scored, draw by draw; a protocol that draws nothing has one draw of one part.

    Draw n (from 0) sorts the gallery by the numbers of PCG64 seeded with n, a stream that numpy promises never to
    change, and takes the first image of each identity: the same on every machine for the same gallery in this order.
    """
    if not protocol.drawn:
        return [[Part(np.arange(query.total), slice(None), find_matches(query, gallery, protocol))]]
    if protocol.one_per_identity and not np.array_equal(query.identities, gallery.identities):
        raise not_one_list(protocol)
    kept = np.flatnonzero(~np.isin(gallery.identities, protocol.drop_identities))
    draws = []
    for draw in range(protocol.draws):
        order = kept[np.argsort(np.random.PCG64(draw).random_raw(gallery.total)[kept], kind="stable")]
        if protocol.one_per_identity:
            shots = _first_of_each(order, gallery.identities)
            sides = [(np.setdiff1d(np.arange(query.total), shots), shots)]
        else:
            # The gallery's view is another than the query's; an identity without such an image keeps what it has.
            asking, answering = _cameras(query, protocol), _cameras(gallery, protocol)[order]
            sides = [
                (
                    np.flatnonzero(asking == camera),
                    _first_of_each(order[np.argsort(answering == camera, kind="stable")], gallery.identities),
                )
                for camera in np.unique(asking)
            ]
        draws.append(
            [Part(asks, shots, find_matches(query.take(asks), gallery.take(shots), protocol)) for asks, shots in sides]
        )
    return draws


def _first_of_each(order: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """The first image of each identity in this order, as ascending gallery indices."""
    _, first = np.unique(identities[order], return_index=True)
    return np.sort(order[first])


def not_one_list(protocol: Protocol) -> UserError:
    return UserError(
        f"protocol '{protocol.name}' draws its gallery from one list of all test images: give the same list as query "
        "and as gallery, or use --protocol plain where the gallery is drawn already"
    )


def nothing_scored(query: Tags, gallery: Tags, protocol: Protocol) -> UserError:
    """Why no query has a match in the gallery, and what to do."""
    nobody = f"none of the {query.total} queries has "
    wanted = np.setdiff1d(query.identities, protocol.drop_identities)
    if not np.isin(wanted, gallery.identities).any():
        return UserError(
            f"{nobody}a gallery image of its identity, so nothing can be scored; number the identities of query and "
            "gallery by one list"
        )
    if protocol.one_per_identity:
        return UserError(
            f"{nobody}a second image of its identity, so nothing can be scored; give a list with at least two images of "
            "some identity"
        )
    if not protocol.remove_same_camera:
        return UserError(
            f"{nobody}a gallery image of its identity beside itself, so nothing can be scored; give at least two images of "
            "some identity"
        )
    if line := one_camera(query, gallery, protocol):
        return UserError(line)
    return UserError(
        f"{nobody}a gallery image of its identity from another camera, so nothing can be scored; give the true cameras, "
        "or use --protocol plain to ignore them"
    )

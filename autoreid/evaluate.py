"""From a network and samples to metrics: extract features, rank, score; and a retrieval task out of training people.

Query and gallery speak once, at the end. Whatever is chosen on the way (a recipe, an epoch, a genotype) is chosen on
``held_out_split`` of training identities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from autoreid import parallel
from autoreid.data import Sample, picture_numbers
from autoreid.errors import UserError, unknown
from autoreid.loading import enlarged, load_images, normalise
from autoreid.metrics import DENOMINATORS, Protocol, RetrievalMetrics, find_protocol, retrieval_metrics
from autoreid.protocols import Tags, find_draws, not_one_list, nothing_scored, one_camera
from autoreid.recipe import require_views
from autoreid.rerank import check_expand, check_rerank, expand_queries
from autoreid.runs import Preempted, asked_to_stop

POOLINGS = ("mean", "max")


@dataclass(frozen=True)
class Evaluation:
    """What the figures of one network on one dataset may differ in; a result records all of it.

    ``views`` of a picture and ``frames`` of a tracklet: see :func:`extract`. ``rerank`` (k1, k2, lambda):
    ``rerank.reranked_blocks``; ``expand`` (k, alpha): ``rerank.expand_queries``, before it. ``denominator`` "scored" or
    "all": see ``metrics.RetrievalMetrics``. ``skip_unreadable`` leaves pictures out that cannot be read, and counts them.
    """

    views: int = 1
    frames: str = "mean"
    rerank: tuple[int, int, float] | None = None
    expand: tuple[int, float] | None = None
    denominator: str = "scored"
    skip_unreadable: bool = False

    def check(self, protocol: str | Protocol) -> Protocol:
        """The protocol of that name. Raises UserError: a choice that does not exist or does not go with the protocol."""
        rule = find_protocol(protocol)
        require_views(self.views)
        if self.frames not in POOLINGS:
            raise unknown("frames", self.frames, POOLINGS)
        if self.denominator not in DENOMINATORS:
            raise unknown("denominator", self.denominator, DENOMINATORS)
        if rule.drawn and (self.rerank or self.expand):
            raise UserError(
                f"protocol '{rule.name}' draws its gallery anew, and re-ranking or expansion would see all of it: leave "
                "--rerank and --expand out, or use --protocol plain, where the whole gallery answers"
            )
        if self.rerank is not None:
            check_rerank(*self.rerank)
        if self.expand is not None:
            check_expand(*self.expand)
        return rule

    def to_dict(self) -> dict[str, Any]:
        """For a result: the counts and names, the constants by their names."""
        rerank = dict(zip(("k1", "k2", "lambda"), self.rerank, strict=True)) if self.rerank else None
        expand = dict(zip(("k", "alpha"), self.expand, strict=True)) if self.expand else None
        return {"views": self.views, "frames": self.frames, "rerank": rerank, "expand": expand,
                "denominator": self.denominator}


USUAL = Evaluation()


def extract(
    net: nn.Module,
    samples: Sequence[Sample],
    size: tuple[int, int],
    device: str | torch.device = "cpu",
    batch: int = 128,
    views: int = 1,
    pooling: str = "mean",
) -> Tensor:
    """Features N x D float32 on the CPU: the mean over a picture's ``views``.

    1: the picture; 2: and its mirror image; 10: the four corners and the middle of the picture an eighth larger, and
    their mirror images (DaRe, Wang et al. 2018, section 4). A tracklet's feature is the mean or the maximum
    (``pooling``) of its frames' features: DaRe takes the mean, the authors of MARS the maximum.

    The network works in eval mode and keeps the mode it had, module by module. size = (H, W). Memory beside the
    features is a batch of pictures, however long the tracklets. Raises UserError: nothing to extract from, a picture
    cannot be read.
    """
    return _extract(net, samples, size, device, batch, views, pooling, skip_unreadable=False)[0]


def extract_readable(
    net: nn.Module,
    samples: Sequence[Sample],
    size: tuple[int, int],
    device: str | torch.device = "cpu",
    batch: int = 128,
    views: int = 1,
    pooling: str = "mean",
) -> tuple[Tensor, list[Sample], list[str]]:
    """As :func:`extract`, but pictures that cannot be read are left out: features of the samples that remain, these
    samples, and the paths left out. A tracklet remains while one of its frames does."""
    return _extract(net, samples, size, device, batch, views, pooling, skip_unreadable=True)


def _extract(
    net: nn.Module,
    samples: Sequence[Sample],
    size: tuple[int, int],
    device: str | torch.device,
    batch: int,
    views: int,
    pooling: str,
    skip_unreadable: bool,
) -> tuple[Tensor, list[Sample], list[str]]:
    if not samples:
        raise UserError("there are no images to extract features from; check the dataset with `autoreid data NAME`")
    require_views(views)
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    read = enlarged(size, 1.125) if views == 10 else size
    modes = [(module, module.training) for module in net.modules()]
    pooled, counts, unreadable = torch.empty(0), torch.zeros(len(samples), 1), []
    try:
        net.eval()
        with torch.inference_mode():
            own = _features(net, samples, read, size, device, batch, views, skip_unreadable)
            for features, owners, bad in _in_order(own):
                unreadable += bad
                if not len(owners):
                    continue
                counts.index_add_(0, owners, torch.ones(len(owners), 1))
                if not pooled.numel():
                    pooled = torch.full((len(samples), features.shape[1]), 0.0 if pooling == "mean" else -torch.inf)
                if pooling == "mean":
                    pooled.index_add_(0, owners, features)
                else:
                    pooled.scatter_reduce_(0, owners[:, None].expand_as(features), features, "amax")
    finally:
        for module, mode in modes:
            module.training = mode
    seen = counts[:, 0] > 0
    if not seen.any():
        raise UserError(
            f"none of the {len(samples)} images can be read, the first is {unreadable[0]}; copy the images again, "
            "and run `autoreid data NAME --root DIR` to list all unreadable files"
        )
    # Indexing copies: out of inference mode, so that a caller may use the features in a computation with gradients.
    features = pooled[seen] / counts[seen] if pooling == "mean" else pooled[seen]
    return features, [s for s, there in zip(samples, seen.tolist(), strict=True) if there], unreadable


def _features(
    net: nn.Module,
    samples: Sequence[Sample],
    read: tuple[int, int],
    size: tuple[int, int],
    device: str | torch.device,
    batch: int,
    views: int,
    skip_unreadable: bool,
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Of this process's batches the features, whose they are, and the paths left out."""
    for pictures, owners, bad in _batches(samples, read, batch, skip_unreadable):
        if not len(owners):
            yield torch.empty(0), owners, bad
            continue
        images = normalise(pictures.to(device))
        crops = v2.functional.five_crop(images, list(size)) if views == 10 else [images]
        shown = [*crops, *(crop.flip(3) for crop in crops)] if views > 1 else crops
        yield (sum(net(view).float() for view in shown) / len(shown)).cpu(), owners, bad


def _in_order(own: Iterator[tuple[Tensor, Tensor, list[str]]]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The batches of all processes in the order in which one process would make them, on every process: sums come out
    the same, to the bit. A process's turn is one batch; who has none left gives None."""
    fault = None
    while True:
        try:
            mine = next(own, None)
        except UserError as error:  # an unreadable picture: all must learn of it, or the others would wait for ever
            mine, fault = None, error
        turn = parallel.gather_objects((mine, fault))
        if asked_to_stop():
            raise Preempted
        for _, trouble in turn:
            if trouble is not None:
                raise trouble
        if all(batch is None for batch, _ in turn):
            return
        yield from (batch for batch, _ in turn if batch is not None)


def _batches(
    samples: Sequence[Sample], size: tuple[int, int], batch: int, skip_unreadable: bool
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """This process's batches of :func:`_load`; the next is decoded while the network is busy with this one."""
    pictures = iter(_pictures(samples))
    everyones = iter(lambda: list(islice(pictures, batch)), [])
    mine = islice(everyones, parallel.rank(), None, parallel.processes())
    with ThreadPoolExecutor(1) as ahead:
        coming = None
        for following in mine:
            loaded, coming = coming, ahead.submit(_load, following, size, skip_unreadable)
            if loaded is not None:
                yield loaded.result()
        if coming is not None:
            yield coming.result()


def _pictures(samples: Sequence[Sample]) -> Iterator[tuple[int, Sample]]:
    """Every picture with the number of the sample that it belongs to: one, or one per frame of a tracklet."""
    for number, sample in enumerate(samples):
        for path in getattr(sample, "frames", ()) or (sample.path,):
            yield number, Sample(path, sample.identity, sample.camera)


def _load(
    pictures: Sequence[tuple[int, Sample]], size: tuple[int, int], skip_unreadable: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """The pictures B x 3 x H x W uint8, whose they are, and the paths of those left out."""
    bad: list[str] = []
    try:
        images = load_images([sample for _, sample in pictures], size)
    except UserError:
        if not skip_unreadable:
            raise
        kept = []
        for number, sample in pictures:  # one by one: which is it?
            try:
                kept.append((number, sample, load_images([sample], size)))
            except UserError:
                bad.append(sample.path)
        pictures = [(number, sample) for number, sample, _ in kept]
        images = torch.cat([image for _, _, image in kept]) if kept else torch.empty(0, 3, *size, dtype=torch.uint8)
    return images, torch.tensor([number for number, _ in pictures], dtype=torch.int64), bad


@dataclass(frozen=True)
class Extracted:
    """Query and gallery as a network sees them: what the figures and the ranked lists are both made of."""

    query: Tensor  # N x D, expanded where that is asked for
    gallery: Tensor  # M x D
    asking: Sequence[Sample]  # whose the features are: all that could be read
    answering: Sequence[Sample]
    unreadable: Sequence[str]  # the paths left out
    lost: int  # how many queries that cost
    rule: Protocol
    how: Evaluation

    def ranking(self) -> dict[str, Any]:
        """What is ranked and how, as ``metrics.retrieval_metrics`` and ``ranked.ranked_lists`` take it."""
        return {
            "query_features": self.query, "gallery_features": self.gallery, "protocol": self.rule,
            "rerank": self.how.rerank, **_names(self.asking, self.answering, self.rule),
        }

    def metrics(self, metric: str = "euclidean") -> RetrievalMetrics:
        found = parallel.from_first(lambda: retrieval_metrics(
            **self.ranking(), metric=metric, denominator=self.how.denominator, lost=self.lost
        ))
        return dataclasses.replace(found, unreadable=len(self.unreadable))


def evaluate(
    net: nn.Module,
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    size: tuple[int, int],
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
    device: str | torch.device = "cpu",
    how: Evaluation = USUAL,
) -> RetrievalMetrics:
    """Metrics of the network on query against gallery; size = (H, W)."""
    return extract_both(net, query, gallery, size, protocol, device, how).metrics(metric)


def extract_both(
    net: nn.Module,
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    size: tuple[int, int],
    protocol: str | Protocol = "market1501",
    device: str | torch.device = "cpu",
    how: Evaluation = USUAL,
) -> Extracted:
    """What is to be ranked; where query and gallery are one list, its features are extracted once.

    All that names alone can tell is checked first: see :func:`check_task`.
    """
    rule, _ = check_task(query, gallery, protocol, how)
    sides, unreadable = [], []
    for samples in [query] if _one_list(query, gallery) else [query, gallery]:
        features, kept, bad = _extract(net, samples, size, device, 128, how.views, how.frames, how.skip_unreadable)
        sides.append((features.to(device), kept))
        unreadable += bad
    (asking, asked), (answering, answered) = sides[0], sides[-1]
    if how.expand is not None:
        asking = torch.from_numpy(expand_queries(asking, answering, *how.expand)).to(device)
        answering = torch.nn.functional.normalize(answering, dim=1)  # the new queries are of length one
    lost = _asking(query, rule) - _asking(asked, rule)
    return Extracted(asking, answering, asked, answered, unreadable, lost, rule, how)


def check_task(
    query: Sequence[Sample], gallery: Sequence[Sample], protocol: str | Protocol, how: Evaluation = USUAL
) -> tuple[Protocol, list[str]]:
    """The protocol of that name, and lines that must be said of its figures. Raises what an evaluation would find wrong
    without a look at the images, in its words: see :meth:`Evaluation.check`; cameras missing, no query with a match."""
    rule = how.check(protocol)
    if rule.one_per_identity and not _one_list(query, gallery):
        raise not_one_list(rule)
    names = _names(query, gallery, rule)
    ours, theirs = names.pop("pictures") or (None, None)
    tags = (Tags.of(names["query_identities"], names["query_cameras"], None, "query", ours),
            Tags.of(names["gallery_identities"], names["gallery_cameras"], None, "gallery", theirs))
    if not any(len(part.matches.scored()) for part in find_draws(*tags, rule)[0]):
        raise nothing_scored(*tags, rule)
    return rule, [line for line in (one_camera(*tags, rule),) if line]


def _one_list(query: Sequence[Sample], gallery: Sequence[Sample]) -> bool:
    return query is gallery or list(query) == list(gallery)


def _names(query: Sequence[Sample], gallery: Sequence[Sample], rule: Protocol) -> dict[str, Any]:
    """Who is seen by which camera, and where no camera leaves a query's own picture out of its ranking, which is which."""
    return {
        "query_identities": [s.identity for s in query], "query_cameras": [s.camera for s in query],
        "gallery_identities": [s.identity for s in gallery], "gallery_cameras": [s.camera for s in gallery],
        "pictures": None if rule.remove_same_camera or rule.one_per_identity else picture_numbers(query, gallery),
    }


def _asking(samples: Sequence[Sample], rule: Protocol) -> int:
    """How many of the query side ask; of one list an image of each identity answers instead."""
    answer = {s.identity for s in samples} - set(rule.drop_identities) if rule.one_per_identity else ()
    return len(samples) - len(answer)


def without_cameras(samples: Sequence[Sample]) -> bool:
    """Whether the set has none: camera 0 everywhere (see ``data.Sample``)."""
    return not any(sample.camera for sample in samples)


def keep_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(to train on, to watch): all images of a random ``share`` of the identities, at least two where it is above 0, are
    kept out; the same for the same samples and seed. Raises UserError: fewer than two identities are left to train on."""
    if not share:
        return list(samples), []
    identities = sorted({sample.identity for sample in samples})
    count = max(2, math.floor(share * len(identities)))
    if len(identities) - count < 2:
        raise UserError(
            f"held_out={share}: of {len(identities)} training identities {count} would be kept out; leave at least two to "
            "train on"
        )
    chosen = set(np.random.default_rng([seed, 2]).permutation(identities)[:count].tolist())
    return ([s for s in samples if s.identity not in chosen], [s for s in samples if s.identity in chosen])


def held_out_split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """A (query, gallery) task like the test's from training identities, each image in exactly one of the two.

    Per identity and camera the first image (by path) asks, the others answer; an identity seen by one camera only
    answers. Every query has a match from another camera: where single images leave none, an asking one answers. In a
    set without cameras the first image of an identity asks; its protocol is ``plain``.
    """
    if without_cameras(samples):
        of_identity: dict[int, list[Sample]] = {}
        for sample in sorted(samples):
            of_identity.setdefault(sample.identity, []).append(sample)
        first = [images[0] for images in of_identity.values() if len(images) > 1]
        return sorted(first), sorted(set(samples) - set(first))
    cameras: dict[int, dict[int, list[Sample]]] = {}
    for sample in sorted(samples):
        cameras.setdefault(sample.identity, {}).setdefault(sample.camera, []).append(sample)
    query, gallery = [], []
    for identity in sorted(cameras):
        of_camera = cameras[identity]
        asking = {camera: images[0] for camera, images in of_camera.items()} if len(of_camera) > 1 else {}
        answering = [s for images in of_camera.values() for s in images if s != asking.get(s.camera)]
        for camera in sorted(of_camera):
            if camera in asking and all(s.camera == camera for s in answering):
                answering.append(asking.pop(max(other for other in asking if other != camera)))
        query += [asking[camera] for camera in sorted(asking)]
        gallery += answering
    return sorted(query), sorted(gallery)

"""Spending less at run time: a network with exits that is stopped early (DaRe, Wang et al., "Resource Aware Person
Re-identification across Multiple Resolutions", CVPR 2018, section 4).

- *Anytime* (4.1): whenever the budget runs out, the most recent exit answers. :func:`exit_costs` says what each costs.
- *Budgeted stream* (4.2): queries come one by one and may cost a budget on average. :func:`solve_budget` turns it into
  the share that leaves at each exit; :class:`Stream` lets the surest leave first and never looks into the future.

Only queries are budgeted: the gallery keeps the features of all exits, and a query that left at exit s is ranked by
those of exit s. Exits are counted from 1. Nothing is chosen or fitted on query or gallery.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autoreid import cost, data
from autoreid.data import Sample, Splits, picture_numbers
from autoreid.errors import UserError, unknown
from autoreid.evaluate import Extracted, check_task, extract_both, without_cameras
from autoreid.heads import ExitsHead, ReIDNet
from autoreid.loading import load_images, normalise
from autoreid.metrics import RetrievalMetrics, metrics_from_ranks
from autoreid.network import ModelSpec, load_weights
from autoreid.pretrained import sha256_of
from autoreid.protocols import Protocol, Tags, find_draws, find_protocol
from autoreid.ranked import RankedList, ranked_lists
from autoreid.ranking import Features, ranks_of_features
from autoreid.runs import environment, progress, say
from autoreid.train import TESTED, again

CONFIDENCES = ("distance", "margin", "random")
POINTS = 9  # budgets of a curve
ORDERS = 10  # in which a stream's queries come, each a measurement
SHOWN, DEPTH = 4, 8  # queries of either kind in the picture of examples, and their gallery images
GOLDEN = (math.sqrt(5) - 1) / 2
BLOCK = 8_000_000  # distances held at once


# ---------------------------------------------------------------------------------------- what an exit costs
class Until(nn.Module):
    """The network up to an exit: B x 3 x H x W -> B x dims; no later stage runs."""

    def __init__(self, net: ReIDNet, exit: int) -> None:
        super().__init__()
        self.net, self.exit = net, exit

    def forward(self, images: Tensor) -> Tensor:
        return deque(islice(walk(self.net, images), self.exit), maxlen=1).pop()


class Every(nn.Module):
    """All exits in one pass, side by side: B x 3 x H x W -> B x (exits * dims)."""

    def __init__(self, net: ReIDNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(list(walk(self.net, images)), dim=1)


class _Body(nn.Module):
    """The backbone's stages up to one, without a head."""

    def __init__(self, net: ReIDNet, stage: int) -> None:
        super().__init__()
        self.backbone, self.stage = net.backbone, stage

    def forward(self, images: Tensor) -> Tensor:
        maps: Iterable[Tensor] = self.backbone.stages(images)  # type: ignore[operator]
        return deque(islice(maps, self.stage), maxlen=1).pop()


def walk(net: ReIDNet, images: Tensor) -> Iterable[Tensor]:
    """The embeddings of exit 1, 2, ..., each B x dims, computed as they are asked for."""
    return net.head.walk(net.backbone.stages(images))  # type: ignore[operator, union-attr]


def require_exits(net: ReIDNet, name: str) -> int:
    """How many exits the network has. Raises UserError where it has one alone."""
    count = len(net.head.stages) if isinstance(net.head, ExitsHead) else 1
    if count < 2:
        raise UserError(
            f"{name} has one exit, at its end, so nothing can stop early; train a network with an exit after every stage: "
            "autoreid retrain MODEL --dataset NAME --set head=exits (dare-r50 and dare-d201 have them already)"
        )
    return count


class ExitCost(NamedTuple):
    """Multiply-accumulates of one picture that leaves at an exit.

    ``macs``: the stages up to it and its own head, as DaRe's authors count. ``macs_run``: the heads of the exits passed on
    the way too, which is what a stream runs, as it needs their embeddings to decide (and the last one to add them up).
    """

    macs: int
    macs_run: int


def exit_costs(spec: ModelSpec, size: tuple[int, int]) -> list[ExitCost]:
    """What leaving at each exit costs; size = (H, W). Raises UserError: a net without exits, a size it does not take."""
    with torch.device("meta"):
        net = spec.build()
    exits = range(1, require_exits(net, spec.label) + 1)
    run = [cost.measure(partial(Until, net, exit), size).macs for exit in exits]
    body = [cost.measure(partial(_Body, net, exit), size).macs for exit in exits]
    heads = [total - stages for total, stages in zip(run, body, strict=True)]  # of all exits up to this one
    own = [head - before for head, before in zip(heads, [0, *heads], strict=False)]
    return [ExitCost(stages + head, total) for stages, head, total in zip(body, own, run, strict=True)]


# ---------------------------------------------------------------------------------------- from a budget to shares
class Shares(NamedTuple):
    """``p``: the share of all queries that leaves at each exit; ``q``: of those that reach it. ``a`` is the ratio of
    neighbouring shares; infinite where all go to the last exit, None where the shares are no geometric row."""

    a: float | None
    p: tuple[float, ...]
    q: tuple[float, ...]

    @classmethod
    def of(cls, a: float | None, p: Sequence[float]) -> Shares:
        rest = [math.fsum(p[i:]) for i in range(len(p))]
        # where nobody arrives any share would do; the last exit takes all who come
        return cls(a, tuple(p), tuple(share / left if left else 1.0 for share, left in zip(p[:-1], rest)) + (1.0,))

    def mean(self, costs: Sequence[float]) -> float:
        return math.fsum(p * c for p, c in zip(self.p, costs, strict=True))


def solve_budget(costs: Sequence[float], budget: float) -> Shares:
    """The shares p_s = a^(s-1) / Z (DaRe, Eq. 3) whose mean cost is ``budget``, and q_s = p_s / (1 - sum_{i<s} p_i).

    ``costs``, rising, are of one query that leaves at exit 1, 2, ...; the mean rises with a from the first to the last,
    so a is found by bisection. A budget above the last cost sends everything to the last exit (a is infinite).
    Raises UserError: fewer than two exits, costs that do not rise, a budget below the first exit.
    """
    check_budget(costs, budget)
    last = len(costs) - 1

    def shares(x: float) -> list[float]:  # a = x / (1 - x): so a from 0 to infinity is x from 0 to 1
        weights = [x**s * (1 - x) ** (last - s) for s in range(last + 1)]
        total = math.fsum(weights)
        return [w / total for w in weights]

    low, high = 0.0, 1.0
    if budget >= costs[-1]:
        return Shares.of(math.inf, shares(high))
    if budget == costs[0]:
        return Shares.of(0.0, shares(low))
    while low < (middle := (low + high) / 2) < high:
        if Shares.of(None, shares(middle)).mean(costs) < budget:
            low = middle
        else:
            high = middle
    return Shares.of(high / (1 - high) if high < 1 else math.inf, shares(high))


def bracket_budget(costs: Sequence[float], budget: float) -> Shares:
    """The shares of the two neighbouring exits whose costs bracket the budget: what drawing at random interpolates (DaRe,
    section 5.3.2). Raises as :func:`solve_budget`."""
    check_budget(costs, budget)
    p = [0.0] * len(costs)
    s = min(bisect_right(costs, budget), len(costs)) - 1  # the dearest exit within the budget
    p[s] = 1.0
    if s + 1 < len(costs):
        p[s + 1] = (budget - costs[s]) / (costs[s + 1] - costs[s])
        p[s] = 1 - p[s + 1]
    return Shares.of(None, p)


def check_budget(costs: Sequence[float], budget: float) -> None:
    """Raises UserError: nothing to choose from, a budget that no exit keeps to."""
    if len(costs) < 2 or any(b <= a for a, b in zip(costs, costs[1:])):
        raise UserError(f"a budget needs two exits or more, each dearer than the one before; given costs {list(costs)}")
    if not budget >= costs[0]:
        raise UserError(
            f"a budget of {budget:,.0f} multiply-accumulates per query is below the cheapest exit: exit 1 costs "
            f"{costs[0]:,.0f}; give from {costs[0]:,.0f} to {costs[-1]:,.0f} (exit {len(costs)}), or a smaller network"
        )


# ---------------------------------------------------------------------------------------- who leaves where
class Quantiles:
    """Decides online who is among the surest so far.

    At exit s let the n-th query arrive with confidence c. Its place is 1 + how many of the n - 1 before it had a greater
    one; it leaves if place - 1/2 <= q_s n. So the first leaves if q_s is a half or more, and of many exchangeable queries
    a share that tends to q_s leaves, without bias. Equal confidences are told apart by (n times the golden ratio) mod 1,
    which spreads them evenly: q_s holds where all are equal. Every confidence is kept: 16 bytes or so for each, and a
    decision takes time logarithmic in n, but for one move in memory. The last exit takes all.
    """

    def __init__(self, q: Sequence[float]) -> None:
        self.q = tuple(q)
        self._seen: list[list[tuple[float, float]]] = [[] for _ in self.q]

    def leaves(self, exit: int, confidence: float) -> bool:
        """Whether the query that has just reached this exit (from 1) leaves; it is remembered."""
        seen = self._seen[exit - 1]
        n = len(seen) + 1
        entry = (confidence, n * GOLDEN % 1)
        place = n - bisect_right(seen, entry)
        insort(seen, entry)
        return exit == len(self.q) or place - 0.5 <= self.q[exit - 1] * n


class Draws:
    """Decides by chance, the same for the same seed and order: at exit s a share q_s leaves, whatever the confidence."""

    def __init__(self, q: Sequence[float], seed: int = 0) -> None:
        self.q, self._random = tuple(q), np.random.default_rng(seed)

    def leaves(self, exit: int, confidence: float) -> bool:
        return self._random.random() < self.q[exit - 1] or exit == len(self.q)


def shares_for(confidence: str, costs: Sequence[float], budget: float) -> Shares:
    """The shares that a confidence is used with."""
    return (bracket_budget if confidence == "random" else solve_budget)(costs, budget)


def decider(confidence: str, q: Sequence[float], seed: int = 0) -> Quantiles | Draws:
    return Draws(q, seed) if confidence == "random" else Quantiles(q)


def route(confidences: np.ndarray, decide: Quantiles | Draws) -> np.ndarray:
    """The exits (from 1) at which queries leave that come in the order of the rows of ``confidences``, M x S."""
    left = np.empty(len(confidences), int)
    for i, row in enumerate(confidences.tolist()):
        left[i] = next(exit for exit, c in enumerate(row, 1) if decide.leaves(exit, c))
    return left


class Gallery(NamedTuple):
    """What queries are compared by: the features of every exit, each N x D on one device.

    ``identities`` are needed for the margin alone. ``cameras`` and ``pictures`` (``data.picture_numbers``) say which
    images a query leaves out when it judges itself: those of its own camera, as they are no answer under the usual
    protocols, and its own picture. Both are known without a label.
    """

    features: Sequence[Tensor]
    identities: Tensor | None = None
    cameras: Tensor | None = None
    pictures: Tensor | None = None

    def confidence(
        self, kind: str, exit: int, query: Tensor, camera: Tensor | None = None, picture: Tensor | None = None
    ) -> Tensor:
        """How sure B queries (B x D, with B cameras and pictures where the gallery has them) are at an exit, B float32.

        "distance": minus the distance to the nearest image of the gallery. "margin": how much farther the nearest image
        of another identity than that one's is. "random": nothing, zeros. Where no image is left to compare with: -inf;
        where all are of one identity the margin is inf. A query's value does not depend on the others asked with it.
        """
        if kind == "random":
            return torch.zeros(len(query), device=query.device)
        gallery = self.features[exit - 1]
        rows = max(1, BLOCK // len(gallery))
        parts = []
        for start in range(0, len(query), rows):
            block = slice(start, start + rows)
            # no matrix product: its last bits would depend on how many queries are asked at once
            distances = torch.cdist(query[block], gallery, compute_mode="donot_use_mm_for_euclid_dist")
            for own, theirs in ((camera, self.cameras), (picture, self.pictures)):
                if own is not None and theirs is not None:
                    distances.masked_fill_(own[block, None] == theirs, torch.inf)
            nearest, where = distances.min(dim=1)
            if kind == "distance":
                parts.append(-nearest)
                continue
            assert self.identities is not None
            distances.masked_fill_(self.identities[where][:, None] == self.identities, torch.inf)
            margin = distances.amin(dim=1) - nearest
            parts.append(margin.where(nearest < torch.inf, -torch.inf))
        return torch.cat(parts)


class Left(NamedTuple):
    """A query that left: the exit (from 1), its embedding there (1 x D) and how sure it was."""

    exit: int
    embedding: Tensor
    confidence: float


class Stream:
    """Queries one by one, each stopped at the exit that :func:`solve_budget`'s ``q`` and its confidence allow.

    >>> stream = Stream(gallery, solve_budget(costs, budget).q, "distance")   # doctest: +SKIP
    >>> left = stream.ask(walk(net, picture))                                 # doctest: +SKIP
    >>> (left.embedding - gallery.features[left.exit - 1]).norm(dim=1).argsort()   # doctest: +SKIP

    The embeddings are asked for one after another, so that the stages behind the exit do not run. How ties and the first
    queries are decided: :class:`Quantiles`. Raises UserError: an unknown confidence, a margin without identities, another
    number of exits than of shares.
    """

    def __init__(self, gallery: Gallery, q: Sequence[float], confidence: str = "distance", seed: int = 0) -> None:
        if confidence not in CONFIDENCES:
            raise unknown("confidence", confidence, CONFIDENCES)
        if confidence == "margin" and gallery.identities is None:
            raise UserError("the confidence margin needs the identities of the gallery; give them, or take distance")
        if len(gallery.features) != len(q):
            raise UserError(f"the gallery has the features of {len(gallery.features)} exits, the stream {len(q)} shares; "
                            "give one for each exit")
        self.gallery, self.kind, self._decide = gallery, confidence, decider(confidence, q, seed)

    def ask(self, embeddings: Iterable[Tensor], camera: int | None = None, picture: int | None = None) -> Left:
        """Where the query leaves whose embeddings (1 x D each, exit 1 first) these are; no later one is asked for."""
        for exit, embedding in enumerate(embeddings, 1):
            sure = float(self.gallery.confidence(self.kind, exit, embedding, *self.own(camera, picture)))
            if self._decide.leaves(exit, sure):
                return Left(exit, embedding, sure)
        raise ValueError("fewer embeddings than exits")

    def own(self, *numbers: int | None) -> list[Tensor | None]:
        """A query's camera and picture as :meth:`Gallery.confidence` takes them."""
        return [None if n is None else torch.tensor([n], device=self.gallery.features[0].device) for n in numbers]


# ---------------------------------------------------------------------------------------- one dataset at every exit
class Answers:
    """Query and gallery of a dataset at every exit, and what they are worth wherever each query leaves.

    ``query`` and ``gallery``: the features of every exit, Q x D and N x D each. Raises UserError: a protocol that draws
    its gallery, a dataset of tracklets, and all that ``evaluate.extract_both`` finds.
    """

    def __init__(
        self, net: ReIDNet, splits: Splits, size: tuple[int, int], protocol: str | Protocol | None = None,
        device: str = "cpu",
    ) -> None:
        self.rule = check_stream(splits, protocol)
        self.exits = require_exits(net, "the network")
        found = extract_both(Every(net), splits.query, splits.gallery, size, self.rule, device)
        self.query = found.query.chunk(self.exits, dim=1)
        self.gallery = found.gallery.chunk(self.exits, dim=1)
        self._names(found)
        self._ranks = [
            ranks_of_features(Features.of(ours, "query"), Features.of(theirs, "gallery"), "euclidean", self._part)
            for ours, theirs in zip(self.query, self.gallery, strict=True)
        ]

    def _names(self, found: Extracted) -> None:
        ranking = found.ranking()
        ours, theirs = ranking["pictures"] or (None, None)
        sides = [(ranking[f"{side}_identities"], ranking[f"{side}_cameras"]) for side in ("query", "gallery")]
        self.tags = (Tags.of(*sides[0], None, "query", ours), Tags.of(*sides[1], None, "gallery", theirs))
        [[self._part]] = find_draws(*self.tags, self.rule)
        self._ranking = {key: ranking[key] for key in ranking if not key.endswith("features")}
        self.asking, self.answering = found.asking, found.answering

    @property
    def queries(self) -> int:
        return len(self.asking)

    def metrics(self, left: Sequence[int] | np.ndarray) -> RetrievalMetrics:
        """Of all queries together, query i by exit ``left[i]`` (from 1) against the gallery's features of that exit. Exact
        ranks, those of ``metrics.retrieval_metrics``."""
        scored = self._part.matches.scored()
        ranks = [self._ranks[left[i] - 1][n] for n, i in enumerate(scored)]
        return metrics_from_ranks([ranks], *self.tags, self.rule)

    def compared(self) -> tuple[Gallery, Tensor | None, Tensor | None]:
        """The gallery for a :class:`Stream`, and the queries' cameras and pictures, where the protocol leaves them out."""
        device = self.gallery[0].device

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, device=device)

        identities = tensor([s.identity for s in self.answering])
        if self.rule.remove_same_camera and not without_cameras(self.answering):
            cameras = [tensor([s.camera for s in side]) for side in (self.asking, self.answering)]
            return Gallery(self.gallery, identities, cameras[1]), cameras[0], None
        pictures = [tensor(numbers) for numbers in picture_numbers(self.asking, self.answering)]
        return Gallery(self.gallery, identities, None, pictures[1]), None, pictures[0]

    def confidences(self, kind: str) -> np.ndarray:
        """How sure every query is at every exit, Q x S float64."""
        gallery, cameras, pictures = self.compared()
        columns = [gallery.confidence(kind, s, query, cameras, pictures) for s, query in enumerate(self.query, 1)]
        return torch.stack(columns, dim=1).double().cpu().numpy()

    def lists(self, queries: Sequence[int], left: Sequence[int] | np.ndarray) -> list[RankedList]:
        """What the gallery answers first to each of these queries, at the exit where it left."""
        found: dict[int, RankedList] = {}
        for s, (query, gallery) in enumerate(zip(self.query, self.gallery, strict=True), 1):
            if mine := [i for i in queries if left[i] == s]:
                lists = ranked_lists(query, gallery_features=gallery, queries=mine, depth=DEPTH, **self._ranking)
                found |= dict(zip(mine, lists, strict=True))
        return [found[i] for i in queries]


def check_stream(splits: Splits, protocol: str | Protocol | None) -> Protocol:
    """The protocol, by names alone. Raises UserError where a stream of queries has no meaning under it, or no picture."""
    rule = find_protocol(protocol or splits.protocol)
    if rule.drawn:
        raise UserError(
            f"protocol '{rule.name}' draws its gallery anew, and a stream compares every query with one gallery: use "
            "--protocol plain, where the whole gallery answers"
        )
    if any(sample.frames for sample in (*splits.query, *splits.gallery)):
        raise UserError(f"{splits.name} has tracklets, and a budget is for a picture: give a dataset of single pictures")
    return check_task(splits.query, splits.gallery, rule)[0]


def order_of(queries: int, seed: int, number: int = 0) -> np.ndarray:
    """The order in which the queries of a stream come: a file's neighbours are the same person."""
    return np.random.default_rng([seed, number]).permutation(queries)


def run_stream(
    confidences: np.ndarray, kind: str, q: Sequence[float], seed: int = 0, number: int = 0
) -> np.ndarray:
    """Where each query leaves (Q, exits from 1, in the queries' own order) in the stream's order of that number."""
    order = order_of(len(confidences), seed, number)
    left = np.empty(len(order), int)
    left[order] = route(confidences[order], decider(kind, q, seed + number))
    return left


def stream_row(
    answers: Answers, kind: str, confidences: np.ndarray, costs: Sequence[ExitCost], budget: float, seed: int = 0
) -> dict[str, Any]:
    """A stream's figures at one budget, mean and standard deviation (n - 1) over ``ORDERS`` orders of the queries.

    The budget is one of ``macs_run``, what a stream runs; ``macs`` is the same stream in the paper's counting.
    """
    run = [c.macs_run for c in costs]
    shares = shares_for(kind, run, budget)
    lefts = [run_stream(confidences, kind, shares.q, seed, number) for number in range(ORDERS)]
    found = [answers.metrics(left) for left in lefts]
    counts = np.array([np.bincount(left, minlength=len(costs) + 1)[1:] for left in lefts])
    return {
        "confidence": kind, "budget": budget, "a": shares.a if shares.a is not None and shares.a < math.inf else None,
        "p": list(shares.p), "q": list(shares.q), "orders": ORDERS,
        "left": (counts.mean(0) / answers.queries).tolist(),
        "macs_run": _spread(counts @ np.array(run) / answers.queries),
        "macs": _spread(counts @ np.array([c.macs for c in costs]) / answers.queries),
        **{name: _spread([getattr(m, name) for m in found]) for name in ("mAP", "mAP_trapezoid", "mINP")},
        "cmc": {str(k): _spread([m.cmc[k] for m in found]) for k in found[0].cmc},
    }


def _spread(values: Any) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def curve_budgets(costs: Sequence[ExitCost]) -> list[float]:
    """``POINTS`` budgets evenly between the first exit and the last."""
    return np.linspace(costs[0].macs_run, costs[-1].macs_run, POINTS + 2)[1:-1].tolist()


# ---------------------------------------------------------------------------------------- measured time
WAYS = ("stream", "full", "stream_network", "full_network")
PASSES = len(WAYS)


def in_turn(turn: int) -> tuple[str, ...]:
    """The ways in the order of a turn. In four turns each stands once in each place and once right behind each other one,
    for what ran before warms the caches or empties them (Williams' square)."""
    return tuple(WAYS[(turn + step) % len(WAYS)] for step in (0, 1, 3, 2))


def time_stream(
    net: ReIDNet, answers: Answers, kind: str, q: Sequence[float], size: tuple[int, int], count: int, seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Milliseconds per query of a real stream: ``count`` pictures one at a time, the stages behind the exit not run.

    ``stream``: the network to its exit and, at every exit on the way, the search for the nearest of the gallery.
    ``full``: the whole network and one search. ``stream_network`` and ``full_network``: without the searches. An untimed
    pass says where each query leaves, so that any way can come first. Then the stream is run ``PASSES`` times, which
    decides alike; all four ways are timed on each picture, in each pass in another order (:func:`in_turn`), so that each
    has stood in each place once and neither a busy machine nor what ran before favours one. Reading the picture is in
    none. Each query's time is the median of the passes.
    """
    gallery, cameras, pictures = answers.compared()
    order = order_of(answers.queries, seed)[:count].tolist()
    seconds = np.empty((PASSES, len(WAYS), len(order)))
    net = net.to(device).eval()
    until = [Until(net, exit) for exit in range(1, answers.exits + 1)]
    left: list[int] = []
    with torch.inference_mode():
        for turn in range(-1, PASSES):  # of which the first is the untimed one
            stream = Stream(gallery, q, kind, seed)
            for n, i in enumerate(progress(order, len(order), "stream")):
                images = normalise(load_images([answers.asking[i]], size).to(device))
                own = [None if values is None else int(values[i]) for values in (cameras, pictures)]
                float(images[0, 0, 0, 0])  # a GPU has the picture only now
                if turn < 0:
                    left.append(stream.ask(walk(net, images), *own).exit)
                    if n < 3:  # warms up what the stream does not run
                        _go("full", until[-1], stream, images, own)
                    continue
                for name in in_turn(turn + n):
                    way = until[left[n] - 1] if name == "stream_network" else net
                    begin = time.perf_counter()
                    _go(name, way, stream, images, own)
                    seconds[turn, WAYS.index(name), n] = time.perf_counter() - begin
    ms = 1e3 * np.median(seconds, axis=0)
    return {"queries": len(order), "passes": PASSES, "device": device,
            "left": np.bincount(left, minlength=answers.exits + 1)[1:].tolist(),
            **{f"{name}_ms": {"mean": float(row.mean()), **_quartiles(row)} for name, row in zip(WAYS, ms, strict=True)}}


def _go(name: str, net: ReIDNet | Until, stream: Stream, images: Tensor, own: Sequence[int | None]) -> None:
    """One picture by one of :func:`time_stream`'s four ways, until it is done on a GPU too."""
    if name == "stream":
        stream.ask(walk(net, images), *own)  # type: ignore[arg-type]
        return
    embedding = net(images)
    if name == "full":
        gallery = stream.gallery
        float(gallery.confidence(stream.kind, len(gallery.features), embedding, *stream.own(*own)))
    else:
        embedding.cpu()


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "iqr": float(high - low)}


# ---------------------------------------------------------------------------------------- the whole study
class Study(NamedTuple):
    """``record`` is what anytime.json holds; the lists are of the surest queries that left at the first exit and of the
    least sure that went to the last, in the stream that was timed, which was by ``confidence``. With "random" nobody is
    sure: they are the first that came."""

    record: dict[str, Any]
    confidence: str
    easy: list[RankedList]
    hard: list[RankedList]
    asking: Sequence[Sample]
    answering: Sequence[Sample]


def study(
    weights: str | Path,
    splits: Splits,
    *,
    budget: float | None = None,
    confidences: Sequence[str] = CONFIDENCES,
    against: Sequence[str | Path] = (),
    protocol: str | None = None,
    timed: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> Study:
    """Exits, ensemble, streams and measured time of trained weights on a dataset's query and gallery.

    ``budget`` in multiply-accumulates per query; None: :data:`POINTS` of them between the first exit and the last.
    ``against``: weights of separately trained networks, run in ascending order of size, of which the most recent answers
    (DaRe, section 5.3.1); one that was trained otherwise is warned of, on stderr and in the record. ``timed`` queries are
    run one by one, 0 for none; at the budget, of a curve at the middle one, by the first of the confidences. Raises
    UserError: weights without exits, weights given twice, a budget below the first exit, and as :class:`Answers`.
    """
    if wrong := [name for name in confidences if name not in CONFIDENCES]:
        raise unknown("confidence", wrong[0], CONFIDENCES)
    net, header = load_weights(weights)
    exits = require_exits(net, str(weights))
    spec, size = ModelSpec.from_dict(header["model"]), (int(header["input"][0]), int(header["input"][1]))
    costs = exit_costs(spec, size)
    run = [c.macs_run for c in costs]
    if budget is not None:
        check_budget(run, budget)
    rule = check_stream(splits, protocol)
    budgets = curve_budgets(costs) if budget is None else [budget]
    origin = again(weights, header, splits)
    others = _ascending(against, weights, _training(header, origin), splits)
    warnings = list(origin["warnings"])
    if budget is not None and budget >= run[-1]:
        warnings.append(f"the budget of {budget:,.0f} covers the last exit ({run[-1]:,}): every query goes there")
    told = [(member.path, line) for member in others for line in member.warnings]
    for line in (*warnings, *(f"{path}: {line}" for path, line in told)):
        say(f"warning: {line}")
    warnings += [f"{Path(path).name}: {line}" for path, line in told]
    say(f"{len(splits.query)} queries against {len(splits.gallery)} gallery images at {exits} exits")
    answers = Answers(net.to(device), splits, size, rule, device)
    rows = []
    for number, c in enumerate(costs, 1):
        metrics = answers.metrics(np.full(answers.queries, number))
        rows.append({"exit": number, **c._asdict(), **_figures(metrics),
                     "latency_ms": cost.latency(Until(net, number), size, device, at_most_s=5)})
    ensemble = _ensemble(others, splits, rule, device)
    sure = {kind: answers.confidences(kind) for kind in confidences}
    streams = [stream_row(answers, kind, sure[kind], costs, b, seed) for kind in confidences for b in budgets]
    kind, middle = confidences[0], budgets[len(budgets) // 2]
    q = shares_for(kind, run, middle).q
    measured = {"confidence": kind, "budget": middle,
                **time_stream(net, answers, kind, q, size, timed, seed, device)} if timed else None
    left = run_stream(sure[kind], kind, q, seed)
    surest = np.argsort(-sure[kind][:, 0], kind="stable")
    surest, least = (surest, surest[::-1]) if kind != "random" else (order_of(answers.queries, seed),) * 2
    easy = [int(i) for i in surest if left[i] == 1][:SHOWN]
    hard = [int(i) for i in least if left[i] == exits][:SHOWN]
    label = origin.pop("model", spec.label)
    record = {
        "model": label, "genotype": spec.genotype.key() if spec.genotype else None, "weights": _named(weights),
        "dataset": splits.name, "edition": splits.edition or None, "fingerprint": data.fingerprint(splits, TESTED),
        "protocol": rule.name, "input": list(size), "views": 1,
        "queries": {"total": metrics.total, "scored": metrics.scored},
        "fusion": net.head.fusion.tolist(),  # type: ignore[union-attr, operator]
        "exits": rows, "ensemble": ensemble, "streams": streams, "timed": measured, **origin,
        "warnings": warnings, "evaluation_seed": seed, "environment": environment(),
    }
    return Study(record, kind, answers.lists(easy, left), answers.lists(hard, left), answers.asking, answers.answering)


def _figures(metrics: RetrievalMetrics) -> dict[str, Any]:
    found = metrics.to_dict()
    return {name: found[name] for name in ("mAP", "mAP_trapezoid", "mINP", "cmc")}


def _named(weights: str | Path) -> dict[str, str]:
    """A file by its name and content: where it lies differs from machine to machine."""
    return {"file": Path(weights).name, "sha256": sha256_of(Path(weights))}


class _Member(NamedTuple):
    """A network of the ensemble; ``warnings`` are of its test images and of how its training differs."""

    macs: int
    path: str | Path
    net: ReIDNet
    size: tuple[int, int]
    origin: Mapping[str, Any]
    warnings: Sequence[str]


def _training(header: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """What exits and ensemble are to have in common, so that they differ by their networks alone."""
    names = ("trained_on", "train_fingerprint", "recipe", "seed", "init")
    return {**{name: origin.get(name) for name in names}, "input": "x".join(map(str, header["input"]))}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """A warning of how a member of the ensemble was trained (:func:`_training`), or none. What old weights do not say is
    not compared."""
    told = [name for name in ours if None not in (ours[name], theirs[name]) and ours[name] != theirs[name]]
    if not told:
        return []
    what = ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in told)
    return [f"trained otherwise than the network with the exits: {what}; the two curves differ by that too"]


def _ascending(
    paths: Sequence[str | Path], weights: str | Path, training: Mapping[str, Any], splits: Splits
) -> list[_Member]:
    """The ensemble's networks by what they cost, cheapest first. ``training`` is that of ``weights``, the network with the
    exits. Raises UserError: a file that was given before, by its content."""
    members: list[_Member] = []
    given = {sha256_of(Path(weights)): weights}
    for path in paths:
        net, header = load_weights(path)
        if (digest := sha256_of(Path(path))) in given:
            raise UserError(f"--against {path}: the same weights as {given[digest]}; an ensemble is of networks trained "
                            "separately: give each once, and not the one with the exits")
        given[digest] = path
        size, origin = (int(header["input"][0]), int(header["input"][1])), again(path, header, splits)
        members.append(_Member(
            cost.measure(ModelSpec.from_dict(header["model"]).build, size).macs, path, net, size, origin,
            [*origin["warnings"], *_differences(training, _training(header, origin))],
        ))
    return sorted(members, key=lambda member: (member.macs, str(member.path)))


def _ensemble(members: Sequence[_Member], splits: Splits, rule: Protocol, device: str) -> list[dict[str, Any]]:
    """A row per network: what it and those before it cost together, and how well it does alone, as its result counts."""
    rows, total = [], 0
    for macs, path, net, size, origin, _ in members:
        total += macs
        metrics = extract_both(net.to(device), splits.query, splits.gallery, size, rule, device).metrics()
        rows.append({
            "model": origin.get("model", Path(path).stem), "weights": _named(path), "input": list(size), "macs": macs,
            "macs_run": total, **_figures(metrics), "latency_ms": cost.latency(net, size, device, at_most_s=5),
            **{name: origin.get(name) for name in ("trained_on", "train_fingerprint", "recipe", "seed", "init")},
        })
    return rows

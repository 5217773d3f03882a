"""Early exits: exact costs, the budget's shares, streams that see no future, and the command."""

import functools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import planted
import pytest
import reference_anytime
import reference_metrics
import torch
from PIL import Image

from autoreid import anytime, data, plots, plots_anytime
from autoreid.anytime import (
    Answers,
    Draws,
    Gallery,
    Quantiles,
    Stream,
    Until,
    bracket_budget,
    exit_costs,
    order_of,
    route,
    run_stream,
    shares_for,
    solve_budget,
    walk,
)
from autoreid.cli import build_parser, main
from autoreid.data import Sample, Splits
from autoreid.errors import UserError
from autoreid.evaluate import extract
from autoreid.loading import IMAGENET_MEAN, IMAGENET_STD
from autoreid.metrics import retrieval_metrics
from autoreid.network import find_model, save_weights

SIZE = (32, 16)
PUBLISHED = (523_568_640, 1_150_094_336, 2_060_915_200, 2_542_295_040)  # the constants behind the paper's figures 5 and 6
TINY = {"stem": 3, "width": 4, "head": "exits", "hidden": 16, "embedding_dim": 8}


def a_net(options=None, name="resnet18", seed=0):
    torch.manual_seed(seed)
    spec = find_model(name, TINY if options is None else options)
    net = spec.build()
    for module in net.modules():  # statistics of their own, or every exit of a fresh net is nearly constant
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        net.train().branches(torch.rand(8, 3, *SIZE))
    return net.eval(), spec


# ---------------------------------------------------------------------------------------- costs
@functools.cache
def dare(name):
    return exit_costs(find_model(name), (256, 128))


@pytest.mark.parametrize(("name", "alone"), [
    ("dare-r50", [513_671_168, 1_185_021_952, 2_141_847_552, 2_671_378_432]),
    ("dare-d201", [756_940_800, 1_289_879_552, 2_377_515_008, 2_803_367_936]),
])
def test_dares_exits_cost_what_the_paper_s_layers_do(name, alone):
    costs = dare(name)
    assert [c.macs for c in costs] == alone
    heads = [(c + 128) * 1024 for c in ((256, 512, 1024, 2048) if name == "dare-r50" else (256, 512, 1792, 1920))]
    if name == "dare-r50":
        assert heads == [393_216, 655_360, 1_179_648, 2_228_224]
    assert [c.macs_run - c.macs for c in costs] == [sum(heads[:s]) for s in range(4)]  # the heads passed on the way


def test_a_network_without_exits_is_told_how_to_get_them():
    with pytest.raises(UserError, match="^resnet18 has one exit, at its end, so nothing can stop early; train a network "
                       "with an exit after every stage: autoreid retrain MODEL --dataset NAME --set head=exits"):
        exit_costs(find_model("resnet18"), SIZE)


# ---------------------------------------------------------------------------------------- stopping early
SEARCHED = {"channels": 4, "layers": [1, 1, 1], "stem": "half", "head": "exits", "hidden": 16}


@pytest.mark.parametrize(("name", "options"), [
    ("resnet18", TINY), ("resnet18", {**TINY, "neck": "batch"}), ("resnet18", {**TINY, "neck": "layer", "slice": 4}),
    ("resnet18", {**TINY, "rank": 4}), ("resnet18", {**TINY, "int8": True}), ("autoreid-retrieval-reid", SEARCHED),
    ("shufflenet-v2-x0.5", {"head": "exits", "hidden": 16}), ("safr-micro", {"head": "exits", "hidden": 16}),
])
def test_walking_gives_the_exits_of_a_full_pass(name, options):
    net, _ = a_net(options, name)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        whole = net.head.exits(net.maps(images))
        walked = list(walk(net, images))
        assert len(walked) == len(whole) > 2
        for number, (one, other) in enumerate(zip(walked, whole, strict=True), 1):
            assert torch.equal(one, other) and torch.equal(Until(net, number)(images), other)
        assert torch.equal(walked[-1], net(images))


def ran(net):
    """Notes which stages and heads run."""
    seen = []
    for kind, modules in (("stage", net.backbone.layers), ("head", net.head.stages)):
        for number, module in enumerate(modules, 1):
            module.register_forward_hook(lambda *_, what=(kind, number): seen.append(what))
    return seen


def test_who_stops_walking_runs_no_later_stage():
    net, _ = a_net()
    seen, steps = ran(net), iter(walk(net, torch.rand(1, 3, *SIZE)))
    for exit in range(1, 5):
        next(steps)
        assert seen == [pair for s in range(1, exit + 1) for pair in (("stage", s), ("head", s))]


# ---------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize(("budget", "a", "p", "q"), [
    (1.0e9, 0.47522, (0.55299, 0.26279, 0.12488, 0.05935), (0.55299, 0.58787, 0.67787, 1)),
    (1.5e9, 0.92358, (0.28055, 0.25911, 0.23931, 0.22102), None),
    (2.0e9, 1.71967, (0.09292, 0.15978, 0.27478, 0.47252), None),
])
def test_the_budgets_of_the_published_constants(budget, a, p, q):
    found = solve_budget(PUBLISHED, budget)
    assert round(found.a, 5) == a and tuple(round(x, 5) for x in found.p) == p
    if q:
        assert tuple(round(x, 5) for x in found.q) == q
    assert found.mean(PUBLISHED) == pytest.approx(budget, rel=1e-12)


def test_equal_shares_cost_the_mean():
    assert sum(PUBLISHED) // 4 == 1_569_218_304
    found = solve_budget(PUBLISHED, 1_569_218_304)
    assert found.a == pytest.approx(1, abs=1e-12) and found.p == pytest.approx((0.25,) * 4, abs=1e-12)
    assert found.q == pytest.approx((1 / 4, 1 / 3, 1 / 2, 1))


@pytest.mark.parametrize("seed", range(6))
def test_the_shares_are_the_slow_twin_s(seed):
    rng = np.random.default_rng(seed)
    costs = np.cumsum(rng.integers(1, 1000, rng.integers(2, 7))).tolist()
    for budget in rng.uniform(costs[0], costs[-1], 5):
        found, a = solve_budget(costs, budget), reference_anytime.ratio(costs, budget)
        p = reference_anytime.shares(a, len(costs))
        assert found.a == pytest.approx(a, rel=1e-6) and found.p == pytest.approx(p, abs=1e-9)
        assert found.q == pytest.approx(reference_anytime.conditional(p), abs=1e-6) and found.q[-1] == 1
        assert sum(bracket_budget(costs, budget).p) == pytest.approx(1)
        assert bracket_budget(costs, budget).mean(costs) == pytest.approx(budget)


def test_the_ends_of_the_budget():
    first, last = solve_budget((10, 20, 40), 10), solve_budget((10, 20, 40), 99)
    assert (first.a, first.p) == (0, (1, 0, 0)) and first.q[0] == 1
    assert last.p == (0, 0, 1) and last.q == (0, 0, 1) and last.a == float("inf")
    assert solve_budget((10, 20, 40), 40).p == (0, 0, 1)
    near = solve_budget(PUBLISHED, PUBLISHED[0] + 1)
    assert 0 < near.p[1] < 1e-6 and near.mean(PUBLISHED) == pytest.approx(PUBLISHED[0] + 1, abs=1e-4)
    assert bracket_budget((10, 20, 40), 25).p == (0, 0.75, 0.25) and bracket_budget((10, 20, 40), 25).q == (0, 0.75, 1)
    assert bracket_budget((10, 20, 40), 10).p == (1, 0, 0) and bracket_budget((10, 20, 40), 20).p == (0, 1, 0)
    assert bracket_budget((10, 20, 40), 40).p == bracket_budget((10, 20, 40), 41).p == (0, 0, 1)


@pytest.mark.parametrize("solve", [solve_budget, bracket_budget])
@pytest.mark.parametrize(("costs", "budget", "words"), [
    ((1000, 2500), 999, "a budget of 999 multiply-accumulates per query is below the cheapest exit: exit 1 costs 1,000; "
     "give from 1,000 to 2,500 (exit 2), or a smaller network"),
    ((1000, 2500), float("nan"), "a budget of nan multiply-accumulates per query is below the cheapest exit: exit 1 costs "
     "1,000; give from 1,000 to 2,500 (exit 2), or a smaller network"),
    ((1000,), 1000, "a budget needs two exits or more, each dearer than the one before; given costs [1000]"),
    ((5, 5), 5, "a budget needs two exits or more, each dearer than the one before; given costs [5, 5]"),
])
def test_budgets_that_nothing_keeps_to(solve, costs, budget, words):
    with pytest.raises(UserError) as fault:
        solve(costs, budget)
    assert str(fault.value) == words


# ---------------------------------------------------------------------------------------- streams
def sure(queries, exits=4, seed=0, levels=None):
    """Confidences at random; few ``levels`` make ties."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(queries, exits)) if levels is None else rng.integers(0, levels, (queries, exits)).astype(float)


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize("q", [(0.3, 0.5, 0.2, 1), (0, 1, 0.5, 1), (1, 1, 1, 1), (0, 0, 0, 1)])
def test_a_stream_is_the_slow_twin_s(q, levels):
    confidences = sure(150, levels=levels)
    assert route(confidences, Quantiles(q)).tolist() == reference_anytime.stream(confidences.tolist(), q)


def test_the_first_queries_by_hand():
    half = Quantiles((0.5, 1))
    # places 1 of 1 (1/2 <= 1/2), 2 of 2 (3/2 > 1), 1 of 3 (1/2 <= 3/2), 3 of 4 (5/2 > 2), 2 of 5 (3/2 <= 5/2)
    assert [half.leaves(1, c) for c in (0.5, 0.1, 0.9, 0.2, 0.6)] == [True, False, True, False, True]
    assert not Quantiles((0.49, 1)).leaves(1, 0.0)
    assert half.leaves(2, -1.0)  # the last exit takes all


@pytest.mark.parametrize("kind", ["distance", "random"])
def test_no_decision_looks_into_the_future(kind):
    q, confidences = (0.3, 0.4, 0.5, 1), sure(200)
    whole = route(confidences, anytime.decider(kind, q, 5))
    for cut in (1, 50, 150):
        future = np.random.default_rng(cut).permutation(np.arange(cut, 200))
        shuffled = np.concatenate([confidences[:cut], confidences[future]])
        assert np.array_equal(route(shuffled, anytime.decider(kind, q, 5))[:cut], whole[:cut])
        assert np.array_equal(route(confidences[:cut], anytime.decider(kind, q, 5)), whole[:cut])
    if kind == "distance":  # the past does matter
        turned = route(confidences[::-1], anytime.decider(kind, q))[::-1]
        assert (turned != whole).any()


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("kind", ["distance", "random"])
@pytest.mark.parametrize("budget", [0.7e9, 1.5e9, 2.4e9])
def test_the_mean_cost_tends_to_the_budget(kind, budget, levels):
    costs, q = np.array(PUBLISHED), shares_for(kind, PUBLISHED, budget).q

    def error(count, streams):
        lefts = [route(sure(count, 4, seed, levels), anytime.decider(kind, q, seed)) for seed in range(streams)]
        return np.mean([abs(costs[left - 1].mean() / budget - 1) for left in lefts])

    short, long = error(50, 20), error(5000, 2)
    assert long < short / 2 and long < 0.01


def test_easy_queries_leave_first():
    confidences = sure(400, exits=2)
    left = route(confidences, Quantiles((0.5, 1)))
    assert confidences[left == 1, 0].mean() > confidences[left == 2, 0].mean() + 1


def test_the_same_stream_in_its_orders():
    confidences = sure(60)
    q = (0.3, 0.4, 0.5, 1)
    orders = [order_of(60, 1, n) for n in range(2)]
    assert sorted(orders[0]) == list(range(60)) and orders[0].tolist() != orders[1].tolist()
    left = run_stream(confidences, "margin", q, 1, 1)
    assert left[orders[1]].tolist() == reference_anytime.stream(confidences[orders[1]].tolist(), q)
    assert run_stream(confidences, "random", q, 1).tolist() == run_stream(confidences, "random", q, 1).tolist()
    assert run_stream(confidences, "random", q, 1).tolist() != run_stream(confidences, "random", q, 2).tolist()


# ---------------------------------------------------------------------------------------- confidence
@pytest.fixture
def compared():
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(40, 6, generator=generator) for _ in range(3)]
    queries = [torch.randn(9, 6, generator=generator) for _ in range(3)]
    tags = {name: torch.randint(0, high, (40,), generator=generator) for name, high in
            (("identities", 5), ("cameras", 3), ("pictures", 12))}
    return features, queries, tags


@pytest.mark.parametrize("without", [(), ("cameras",), ("pictures",), ("cameras", "pictures")])
@pytest.mark.parametrize("kind", ["distance", "margin"])
def test_the_confidence_is_the_slow_twin_s(compared, kind, without, monkeypatch):
    features, queries, tags = compared
    gallery = Gallery(features, **{name: None if name in without else values for name, values in tags.items()})
    own = [None if name in without else torch.arange(9) % (3 if name == "cameras" else 12)
           for name in ("cameras", "pictures")]
    for exit in (1, 2, 3):
        found = gallery.confidence(kind, exit, queries[exit - 1], *own)
        wanted = []
        for i, query in enumerate(queries[exit - 1]):
            out = [any(mine is not None and int(mine[i]) == int(theirs[g])
                       for mine, theirs in zip(own, (tags["cameras"], tags["pictures"]), strict=True)) for g in range(40)]
            wanted.append(reference_anytime.confidence(kind, query.tolist(), features[exit - 1].tolist(), out,
                                                       tags["identities"].tolist()))
        assert found.tolist() == pytest.approx(wanted, abs=1e-5)
        alone = [gallery.confidence(kind, exit, queries[exit - 1][i : i + 1],
                                    *(None if n is None else n[i : i + 1] for n in own)) for i in range(9)]
        assert torch.equal(torch.cat(alone), found)  # to the bit: or a stream would differ from its replay
        monkeypatch.setattr(anytime, "BLOCK", 80)
        assert torch.equal(gallery.confidence(kind, exit, queries[exit - 1], *own), found)
        monkeypatch.undo()


def test_nobody_left_to_compare_with():
    one = Gallery([torch.randn(4, 3)], torch.tensor([1, 1, 2, 2]), torch.tensor([7, 7, 7, 7]))
    query = torch.randn(2, 3)
    for kind in ("distance", "margin"):
        assert one.confidence(kind, 1, query, torch.tensor([7, 8])).isinf().tolist() == [True, False]
        assert one.confidence(kind, 1, query, torch.tensor([7, 8]))[0] == -torch.inf
    alike = Gallery([torch.randn(4, 3)], torch.tensor([1, 1, 1, 1]))
    assert alike.confidence("margin", 1, query).tolist() == [torch.inf, torch.inf]
    assert one.confidence("random", 1, query).tolist() == [0, 0]


@pytest.mark.parametrize(("gallery", "q", "kind", "words"), [
    (Gallery([torch.randn(4, 3)] * 2), (0.5, 1), "margins", "unknown confidence 'margins'; did you mean 'margin'? known: "
     "distance, margin, random"),
    (Gallery([torch.randn(4, 3)] * 2), (0.5, 1), "margin", "the confidence margin needs the identities of the gallery; "
     "give them, or take distance"),
    (Gallery([torch.randn(4, 3)] * 2), (0.5, 0.5, 1), "distance", "the gallery has the features of 2 exits, the stream 3 "
     "shares; give one for each exit"),
])
def test_streams_that_cannot_be(gallery, q, kind, words):
    with pytest.raises(UserError) as fault:
        Stream(gallery, q, kind)
    assert str(fault.value) == words


# ---------------------------------------------------------------------------------------- a dataset
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("root"), planted.whole, identities=3, test_identities=8, frames=3)


@pytest.fixture(scope="module")
def splits(root) -> Splits:
    return data.load("market", str(root), parts=("query", "gallery"))


@pytest.fixture(scope="module")
def answers(splits):
    return Answers(a_net()[0], splits, SIZE)


def test_the_exits_features_are_those_of_the_exits(answers, splits):
    net = a_net()[0]
    assert answers.exits == 4 and answers.queries == 16
    for exit, (query, gallery) in enumerate(zip(answers.query, answers.gallery, strict=True), 1):
        torch.testing.assert_close(query, extract(Until(net, exit), splits.query, SIZE))
        torch.testing.assert_close(gallery, extract(Until(net, exit), splits.gallery, SIZE))


def test_metrics_of_queries_that_left_at_different_exits(answers, splits):
    names = [[s.identity for s in splits.query], [s.camera for s in splits.query],
             [s.identity for s in splits.gallery], [s.camera for s in splits.gallery]]
    for exit in range(1, 5):
        whole = retrieval_metrics(answers.query[exit - 1], *names[:2], answers.gallery[exit - 1], *names[2:])
        assert answers.metrics(np.full(16, exit)) == whole
    left = np.random.default_rng(0).integers(1, 5, 16)
    distances = [[reference_metrics.distance(answers.query[s - 1][q], other) for other in answers.gallery[s - 1]]
                 for q, s in enumerate(left)]
    wanted = reference_metrics.figures(reference_metrics.ranked_matches(distances, *names))
    found = answers.metrics(left).to_dict()
    assert found["cmc"] == pytest.approx(wanted.pop("cmc"))
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert len({answers.metrics(np.full(16, exit)).mAP for exit in range(1, 5)}) > 1  # exits that are alike test nothing


def test_a_real_stream_is_its_replay_and_runs_no_later_stage(answers, splits):
    net = a_net()[0]
    gallery, cameras, pictures = answers.compared()
    assert gallery.cameras is not None and pictures is None
    q = (0.4, 0.5, 0.5, 1)
    confidences = answers.confidences("margin")
    replay = route(confidences, Quantiles(q))
    stream, seen, agreed = Stream(gallery, q, "margin"), ran(net), 0
    for i in range(16):
        with torch.no_grad():
            images = anytime.normalise(anytime.load_images([splits.query[i]], SIZE))
            left = stream.ask(walk(net, images), int(cameras[i]))
        assert seen == [pair for s in range(1, left.exit + 1) for pair in (("stage", s), ("head", s))]
        seen.clear()
        torch.testing.assert_close(left.embedding, answers.query[left.exit - 1][i : i + 1])
        assert left.confidence == pytest.approx(confidences[i, left.exit - 1], abs=1e-4)
        agreed += left.exit == replay[i]
    assert agreed >= 15  # one picture's features may differ from a batch's in their last bits
    assert len(set(replay.tolist())) > 2


def test_what_a_query_is_not_compared_with(splits, tmp_path):
    net = a_net()[0]
    usual = Answers(net, splits, SIZE)
    inside = Splits("both", (), splits.gallery[:6], splits.gallery, "plain")
    plain = Answers(net, inside, SIZE)
    gallery, cameras, pictures = plain.compared()
    assert cameras is None and gallery.cameras is None and pictures.tolist() == gallery.pictures[:6].tolist()
    assert (plain.confidences("distance") < -1e-6).all()  # not its own picture at distance 0
    # of the own camera's images none is an answer, whoever they show
    gallery, cameras, _ = usual.compared()
    far = Gallery([f + 1e3 * (gallery.cameras == cameras[0])[:, None] for f in gallery.features], *gallery[1:])
    for kind in ("distance", "margin"):
        query = usual.query[0][:1]
        assert torch.equal(far.confidence(kind, 1, query, cameras[:1]), gallery.confidence(kind, 1, query, cameras[:1]))


def test_a_stream_s_row(answers):
    costs = [anytime.ExitCost(10, 10), anytime.ExitCost(20, 22), anytime.ExitCost(30, 35), anytime.ExitCost(40, 50)]
    row = anytime.stream_row(answers, "distance", answers.confidences("distance"), costs, 30)
    shares = solve_budget([10, 22, 35, 50], 30)
    assert (row["a"], row["p"], row["q"]) == (shares.a, list(shares.p), list(shares.q))
    lefts = [run_stream(answers.confidences("distance"), "distance", shares.q, 0, n) for n in range(anytime.ORDERS)]
    run = [np.mean([costs[s - 1].macs_run for s in left]) for left in lefts]
    assert row["macs_run"] == pytest.approx({"mean": np.mean(run), "std": np.std(run, ddof=1)})
    assert row["macs"]["mean"] == pytest.approx(np.mean([[costs[s - 1].macs for s in left] for left in lefts]))
    assert row["mAP"]["mean"] == pytest.approx(np.mean([answers.metrics(left).mAP for left in lefts]))
    assert sum(row["left"]) == pytest.approx(1)
    assert row["left"][0] == pytest.approx(np.mean([(left == 1).mean() for left in lefts]))
    dear = anytime.stream_row(answers, "distance", answers.confidences("distance"), costs, 51)
    assert dear["a"] is None and dear["left"] == [0, 0, 0, 1] and dear["mAP"]["std"] == pytest.approx(0, abs=1e-12)
    assert dear["mAP"]["mean"] == pytest.approx(answers.metrics(np.full(16, 4)).mAP)
    json.dumps(dear, allow_nan=False)


# ---------------------------------------------------------------------------------------- measured time
def test_in_four_turns_each_way_stands_in_each_place_and_behind_each_other():
    turns = [anytime.in_turn(turn) for turn in range(4)]
    assert all(sorted(turn) == sorted(anytime.WAYS) for turn in turns) and anytime.in_turn(4) == turns[0]
    for way in anytime.WAYS:
        assert sorted(turn.index(way) for turn in turns) == [0, 1, 2, 3]
    behind = [pair for turn in turns for pair in zip(turn, turn[1:], strict=False)]
    assert len(set(behind)) == len(behind) == 12
    assert anytime.PASSES == 4  # of which each picture sees every turn


class Clock:
    """Counts a second for each stage that runs and, on top, what depends on the place since the picture was read alone."""

    PLACES = (70.0, 3.0, 11.0, 40.0)

    def __init__(self, net):
        self.now, self.place, self.running = 0.0, 0, False
        for module in net.backbone.layers:
            module.register_forward_hook(lambda *_: self.tick(1.0))

    def tick(self, seconds):
        self.now += seconds

    def read(self, *arguments):
        self.place = 0
        return anytime_load_images(*arguments)

    def perf_counter(self):
        if self.running:
            self.now += self.PLACES[self.place]
            self.place += 1
        self.running = not self.running
        return self.now


anytime_load_images = anytime.load_images


@pytest.mark.parametrize(("q", "stages"), [((0, 0, 0, 1), 4), ((0, 1, 1, 1), 2), ((0.5, 0.4, 0.5, 1), None)])
def test_ways_of_equal_work_take_equal_time_whatever_their_place(answers, monkeypatch, q, stages):
    net = a_net()[0]
    clock = Clock(net)
    monkeypatch.setattr(anytime, "time", clock)
    monkeypatch.setattr(anytime, "load_images", clock.read)
    found = anytime.time_stream(net, answers, "distance", q, SIZE, 7, seed=3)
    assert (found["queries"], found["passes"]) == (7, 4)
    order = order_of(answers.queries, 3)[:7]
    left = route(answers.confidences("distance")[order], Quantiles(q))
    assert found["left"] == np.bincount(left, minlength=5)[1:].tolist()
    assert stages is None or set(left.tolist()) == {stages}
    every = np.median(anytime.PASSES * [Clock.PLACES], axis=1)[0]  # of each query and way alike
    for way in ("stream", "stream_network"):
        assert found[f"{way}_ms"]["mean"] == pytest.approx(1e3 * (every + left.mean()))
    for way in ("full", "full_network"):
        assert found[f"{way}_ms"] == pytest.approx({"mean": 1e3 * (every + 4), "median": 1e3 * (every + 4), "iqr": 0})


def test_streams_that_have_no_meaning(splits):
    net = a_net()[0]
    with pytest.raises(UserError, match="^protocol 'cuhk03-classic' draws its gallery anew, and a stream compares every "
                       "query with one gallery: use --protocol plain, where the whole gallery answers$"):
        Answers(net, splits, SIZE, "cuhk03-classic")
    track = Sample(splits.query[0].path, 4, 1, (splits.query[0].path, splits.query[1].path))
    tracks = Splits("mars", (), (track,), splits.gallery, "mars")
    with pytest.raises(UserError, match="^mars has tracklets, and a budget is for a picture: give a dataset of single "
                       "pictures$"):
        Answers(net, tracks, SIZE)


def test_draws_keep_their_seed():
    one, other = Draws((0.5, 1), 3), Draws((0.5, 1), 3)
    assert [one.leaves(1, 0.0) for _ in range(20)] == [other.leaves(1, 9.0) for _ in range(20)]
    assert one.leaves(2, 0.0) and not any(Draws((0, 1), 3).leaves(1, 0.0) for _ in range(20))


# ---------------------------------------------------------------------------------------- the command
def written(path, options, name="resnet18", seed=0, size=SIZE, **training):
    net, spec = a_net(options, name, seed)
    said = {"recipe": "r", "seed": 0, "init": "scratch", **training}
    origin = {"origin": {"trained_on": "market", "train_fingerprint": "one", **said}} if training else {}
    save_weights(path, net, spec, mean=IMAGENET_MEAN, std=IMAGENET_STD, dataset="market", name=path.stem,
                 input=list(size), **{key: said[key] for key in ("recipe", "seed", "init")}, **origin)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return written(tmp_path_factory.mktemp("weights") / "net-s0.safetensors", TINY)


def words(capsys, *argv):
    """The one line on stderr of a command that ends with a user's mistake."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_the_curve_the_ensemble_and_the_pictures(weights, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    against = [written(tmp_path / f"{name}.safetensors", {"stem": 3, "width": width}, seed=seed, recipe=recipe)
               for name, width, seed, recipe in (("large", 8, 0, "r"), ("small", 4, 0, "q"))]
    command = ["anytime", weights, "--dataset", "market", "--root", str(root), "--timed", "6", "--json"]
    assert main([*command, "--against", *against]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    folder = tmp_path / "results" / "market" / "net-s0-anytime"
    assert sorted(path.name for path in folder.iterdir()) == ["anytime.json", "curve.png", "examples.png"]
    assert record == json.loads((folder / "anytime.json").read_text())
    for name in ("curve.png", "examples.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
    costs = exit_costs(find_model("resnet18", TINY), SIZE)
    assert [(row["exit"], row["macs"], row["macs_run"]) for row in record["exits"]] == [
        (s, *c) for s, c in enumerate(costs, 1)]
    assert all(row["latency_ms"]["median"] > 0 for row in record["exits"])
    small, large = record["ensemble"]
    assert (small["model"], large["model"]) == ("small", "large") and small["macs_run"] == small["macs"]
    assert large["macs_run"] == small["macs"] + large["macs"] > large["macs"] > small["macs"]
    assert [row["confidence"] for row in record["streams"]] == [kind for kind in anytime.CONFIDENCES for _ in range(9)]
    assert all(costs[0].macs_run < row["budget"] < costs[-1].macs_run for row in record["streams"])
    assert record["timed"]["queries"] == 6 == sum(record["timed"]["left"])
    assert all(record["timed"][f"{way}_ms"]["mean"] > 0 for way in anytime.WAYS)
    assert record["fusion"] == pytest.approx([0.25] * 4) and record["queries"] == {"total": 16, "scored": 16}
    assert record["protocol"] == "market1501" and record["weights"]["file"] == "net-s0.safetensors"
    assert torch.__version__.startswith(record["environment"]["torch"]) and record["evaluation_seed"] == 0
    different = ("trained otherwise than the network with the exits: recipe q instead of r; the two curves differ by that "
                 "too")
    assert record["warnings"] == [f"small.safetensors: {different}"]  # and nothing is refused
    assert [line for line in err.splitlines() if "warning" in line] == [f"warning: {against[1]}: {different}"]
    [following] = [line for line in err.splitlines() if line.startswith("next: ")]
    proposed = build_parser().parse_args(shlex.split(following[following.index("autoreid") :])[1:])
    assert proposed.budget > costs[0].macs_run and proposed.against == against  # or the ensemble would be lost
    assert words(capsys, *command) == (
        "autoreid: results/market/net-s0-anytime/anytime.json is there already: add --overwrite to replace it, or give "
        "another --out")
    # the same question again: the same figures, but for the clock
    assert main([*command, "--against", *reversed(against), "--overwrite"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name in ("streams", "fusion", "fingerprint"):
        assert again[name] == record[name]
    assert [row["mAP"] for row in again["exits"]] == [row["mAP"] for row in record["exits"]]
    assert [row["model"] for row in again["ensemble"]] == ["small", "large"]


def test_one_budget_as_a_table(weights, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    costs = exit_costs(find_model("resnet18", TINY), SIZE)
    budget = sum(c.macs_run for c in costs) // 4
    there = ["anytime", weights, "--dataset", "market", "--root", str(root), "--out", "any"]
    command = [*there, "--timed", "0"]
    assert main([*command, "--budget", str(budget), "--confidence", "margin"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(Path("any/market/net-s0-anytime/anytime.json").read_text())
    [row] = record["streams"]
    assert (row["confidence"], row["budget"], record["timed"], record["ensemble"]) == ("margin", budget, None, [])
    assert row["a"] == pytest.approx(1)
    assert f"{costs[1].macs:,}" in out and f"{costs[1].macs_run:,}" in out and f"{budget:,}" in out
    assert re.search(r"^margin .* ± ", out, re.M) and "measured on" not in out
    [following] = [line for line in err.splitlines() if line.startswith("next: ")]
    assert following.endswith("--out any --budget curve --overwrite")
    assert main([*there, "--timed", "2", "--budget", "9e9", "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"measured on cpu, 2 queries one by one \(distance, budget 9,000,000,000\): [\d.]+ ms \(median "
                     r"[\d.]+\) per query on average, .* left at the exits: 0, 0, 0, 2$", out, re.M)
    assert f"warning: the budget of 9,000,000,000 covers the last exit ({costs[-1].macs_run:,}): every query goes" in err
    record = json.loads(Path("any/market/net-s0-anytime/anytime.json").read_text())
    assert record["streams"][0]["left"] == [0, 0, 0, 1]
    assert record["warnings"] == [f"the budget of 9,000,000,000 covers the last exit ({costs[-1].macs_run:,}): every query "
                                  "goes there"]


def test_members_trained_otherwise_are_named(splits, tmp_path):
    ours = {"trained_on": "market", "train_fingerprint": "one", "recipe": "r", "seed": 0, "init": "scratch",
            "input": "32x16"}
    pooled = {"stem": 3, "width": 4}
    paths = [
        written(tmp_path / "same.safetensors", pooled, seed=1, init="scratch"),
        written(tmp_path / "other.safetensors", pooled, seed=2, trained_on="duke", train_fingerprint="two", recipe="q",
                init="imagenet", size=(48, 16)),
        written(tmp_path / "seed.safetensors", pooled, seed=3, **{"train_fingerprint": "two"}),
        written(tmp_path / "old.safetensors", pooled, seed=4),  # does not tell its lists of images
    ]
    exits = written(tmp_path / "exits.safetensors", TINY, init="scratch")
    said = {Path(member.path).stem: list(member.warnings) for member in anytime._ascending(paths, exits, ours, splits)}
    begin, end = "trained otherwise than the network with the exits: ", "; the two curves differ by that too"
    assert said == {
        "same": [], "old": [], "seed": [f"{begin}train_fingerprint two instead of one{end}"],
        "other": [f"{begin}trained_on duke instead of market, train_fingerprint two instead of one, recipe q instead of r, "
                  f"init imagenet instead of scratch, input 48x16 instead of 32x16{end}"],
    }
    assert anytime._differences(ours, {**ours, "seed": 1}) == [f"{begin}seed 1 instead of 0{end}"]


def test_examples_by_chance_say_so(weights, splits, monkeypatch):
    monkeypatch.setattr(anytime.cost, "latency", lambda *_, **options: {})
    costs = [c.macs_run for c in exit_costs(find_model("resnet18", TINY), SIZE)]
    for kind, easy in (("random", "by chance"), ("distance", "the surest")):
        found = anytime.study(weights, splits, budget=(costs[0] + costs[1]) / 2, confidences=[kind], timed=0)
        assert found.confidence == kind and found.easy
        figure = plots_anytime.examples(*found[2:6], "title", confidence=found.confidence)
        assert figure.subfigs[0].get_suptitle() == f"Left at the first exit, {easy}"
        if kind == "random":
            shown, order = [ranked.query for ranked in found.easy], order_of(len(splits.query), 0).tolist()
            left = run_stream(np.zeros((len(order), 4)), kind, bracket_budget(costs, (costs[0] + costs[1]) / 2).q)
            assert shown == [i for i in order if left[i] == 1][: anytime.SHOWN]


def test_mistakes_are_one_line_before_any_picture_is_read(weights, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anytime, "extract_both", lambda *_: pytest.fail("pictures were read"))
    there = ["--dataset", "market", "--root", str(root)]
    [first, *_, last] = exit_costs(find_model("resnet18", TINY), SIZE)
    assert words(capsys, "anytime", weights, *there, "--budget", "1000") == (
        f"autoreid: a budget of 1,000 multiply-accumulates per query is below the cheapest exit: exit 1 costs "
        f"{first.macs:,}; give from {first.macs:,} to {last.macs_run:,} (exit 4), or a smaller network")
    pooled = written(tmp_path / "pooled.safetensors", {"stem": 3, "width": 4})
    assert words(capsys, "anytime", pooled, *there) == (
        f"autoreid: {pooled} has one exit, at its end, so nothing can stop early; train a network with an exit after every "
        "stage: autoreid retrain MODEL --dataset NAME --set head=exits (dare-r50 and dare-d201 have them already)")
    assert words(capsys, "anytime", weights, *there, "--confidence", "marging").startswith(
        "autoreid: unknown confidence 'marging'; did you mean 'margin'?")
    for budget in ("lots", "nan", "inf", "-1e9"):
        assert f"'{budget}' is no budget: give multiply-accumulates per query, as 1.5e9, or curve" in words(
            capsys, "anytime", weights, *there, f"--budget={budget}")
    assert words(capsys, "anytime", "gone.safetensors", *there).startswith("autoreid: no weights at gone.safetensors:")
    assert words(capsys, "anytime", weights, *there, "--against", "gone.safetensors").startswith(
        "autoreid: no weights at gone.safetensors:")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(pooled).read_bytes())
    for given, before in (([pooled, str(copy)], pooled), ([pooled, pooled], pooled), ([pooled, weights], weights)):
        assert words(capsys, "anytime", weights, *there, "--against", *given) == (
            f"autoreid: --against {given[-1]}: the same weights as {before}; an ensemble is of networks trained "
            "separately: give each once, and not the one with the exits")
    assert words(capsys, "anytime", weights, *there, "--protocol", "cuhk03-classic").startswith(
        "autoreid: protocol 'cuhk03-classic' draws its gallery anew")
    assert not Path("results").exists()


# ---------------------------------------------------------------------------------------- pictures
def test_the_pictures_say_what_they_show(answers, splits, tmp_path):
    costs = [anytime.ExitCost(10_000_000 * s, 11_000_000 * s) for s in range(1, 5)]
    exits = [{"exit": s, **c._asdict(), "mAP": 0.1 * s, "cmc": {"1": 0.2 * s}} for s, c in enumerate(costs, 1)]
    streams = [anytime.stream_row(answers, "margin", answers.confidences("margin"), costs, b) for b in (2e7, 3e7)]
    record = {"model": "net", "dataset": "market", "exits": exits, "ensemble": [], "streams": streams}
    figure = plots_anytime.curve(record)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "MACs per query (million), heads passed on the way included"
    assert [one.get_ylabel() for one in figure.axes] == ["mAP (%)", "rank-1 (%)"]
    assert [note.get_text() for note in axes.texts] == ["1", "2", "3", "4"]
    points = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert points["exits, the most recent answers"].ravel().tolist() == pytest.approx([11, 10, 22, 20, 33, 30, 44, 40])
    [bars] = axes.containers
    assert bars.get_label() == "stream, margin"
    wanted = [[row["macs_run"]["mean"] / 1e6, 100 * row["mAP"]["mean"]] for row in streams]
    assert bars.lines[0].get_xydata().tolist() == [pytest.approx(pair) for pair in wanted]
    plots.save(figure, tmp_path / "curve.png")
    left = np.array([1, 4] * 8)
    easy, hard = answers.lists([0, 2], left), answers.lists([1], left)
    figure = plots_anytime.examples(easy, hard, answers.asking, answers.answering, "who left where")
    titles = [block.get_suptitle() for block in figure.subfigs]
    assert titles == ["Left at the first exit, the surest", "Went to the last exit, the least sure at the first"]
    assert len(figure.subfigs[0].axes) == 2 * len(figure.subfigs[1].axes)
    assert figure.subfigs[0].axes[0].get_title().startswith(f"{splits.query[0].identity}\nAP ")
    figure = plots_anytime.examples(easy, hard, answers.asking, answers.answering, "who left where", confidence="random")
    assert [block.get_suptitle() for block in figure.subfigs] == [
        "Left at the first exit, by chance", "Went to the last exit, by chance"]
    nobody = plots_anytime.examples([], [], answers.asking, answers.answering, "none")
    assert "no query left at the first exit, none went to the last" in [text.get_text() for text in nobody.texts]
    only = plots_anytime.examples([], hard, answers.asking, answers.answering, "one")
    assert len(only.subfigs) == 1


def test_a_list_is_ranked_at_the_exit_where_the_query_left(answers):
    left = np.array([4, 1, 2, 1] * 4)
    asked = [3, 0, 1, 2]
    for ranked, i in zip(answers.lists(asked, left), asked, strict=True):
        exit = left[i]
        assert ranked.query == i
        distances = (answers.gallery[exit - 1] - answers.query[exit - 1][i]).norm(dim=1)
        assert list(ranked.gallery) == distances.double().argsort(stable=True)[: len(ranked.gallery)].tolist()
        assert ranked.distances == pytest.approx(distances[list(ranked.gallery)].tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------- the guide
GUIDE = Path(__file__).parent.parent / "docs" / "anytime.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.M | re.S)


def test_the_commands_of_the_guide_parse():
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    assert sum(command.startswith("autoreid anytime ") for command in commands) >= 3
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


def test_the_guide_s_figures_are_the_counted_ones():
    for name in ("dare-r50", "dare-d201"):
        costs = dare(name)
        for kind, counts in (("alone", [c.macs for c in costs]), ("run", [c.macs_run for c in costs])):
            assert f"| {name}, {kind} | {' | '.join(f'{count:,}' for count in counts)} |" in GUIDE.read_text()


def test_the_guide_s_python_runs(tmp_path, monkeypatch, capsys):
    planted.write_dataset(tmp_path / "data", planted.whole, identities=2, test_identities=4, frames=2)
    (tmp_path / "results" / "market").mkdir(parents=True)
    written(tmp_path / "results" / "market" / "dare-r50-s0.safetensors", TINY)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    exec(compile(code, "anytime.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and {line.split()[1] for line in lines} <= {"1", "2", "3", "4"}

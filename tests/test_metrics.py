"""Retrieval metrics: by hand, against the slow twins, under every protocol, and what they say to a mistake."""

import dataclasses

import numpy as np
import pytest
import reference_metrics as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreid import ranking
from autoreid.errors import UserError
from autoreid.metrics import (
    PROTOCOLS,
    Protocol,
    find_protocol,
    metrics_from_blocks,
    metrics_from_distances,
    retrieval_metrics,
    score,
)
from autoreid.protocols import Tags, find_draws, find_matches, nothing_scored, one_camera
from autoreid.ranking import Features, ranks_of_features


def slow(distances, qi, qc, gi, gc, protocol="market1501", denominator="scored"):
    rule = PROTOCOLS[protocol]
    qi, qc, gi, gc = (np.asarray(x).tolist() for x in (qi, qc, gi, gc))
    rankings = reference.ranked_matches(
        np.asarray(distances).tolist(), qi, qc, gi, gc, rule.drop_identities, rule.remove_same_camera
    )
    return reference.figures(rankings, denominator)


def flat(figures):
    """Every number under one name."""
    named = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            named.update({f"{name} {inner}": x for inner, x in flat(value).items()})
        elif not isinstance(value, str) and value is not None:
            named[name] = value
    return named


def assert_same(metrics, expected):
    wanted = flat(expected)
    assert {name: value for name, value in flat(metrics.to_dict()).items() if name in wanted} == pytest.approx(
        wanted, abs=1e-12
    )


# ---------------------------------------------------------------------------------------- by hand
# Three queries, four gallery images.           g0   g1   g2   g3
DISTANCES = np.array([[0.1, 0.2, 0.3, 0.4],  #  1/c1 2/c2 1/c2 1/c3
                      [0.4, 0.3, 0.2, 0.1],
                      [0.1, 0.1, 0.1, 0.1]])
QUERY_IDS, QUERY_CAMS = [1, 2, 1], [1, 1, 3]
GALLERY_IDS, GALLERY_CAMS = [1, 2, 1, 1], [1, 2, 2, 3]


def test_three_by_four_by_hand():
    # q0: g0 is junk (same camera): g1 g2 g3 = no yes yes, ranks 2, 3
    # q1: g3 g2 g1 g0 = no no yes no, rank 3
    # q2: all tie, gallery order, g3 is junk: g0 g1 g2 = yes no yes, ranks 1, 3
    kept = DISTANCES.copy()
    metrics = metrics_from_distances(DISTANCES, QUERY_IDS, QUERY_CAMS, GALLERY_IDS, GALLERY_CAMS)
    assert np.array_equal(DISTANCES, kept)
    assert metrics.mAP == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 3 + (1 + 2 / 3) / 2) / 3)
    trapezoid = [((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2, (0 + 1 / 3) / 2, (1 + (1 / 2 + 2 / 3) / 2) / 2]
    assert metrics.mAP_trapezoid == pytest.approx(sum(trapezoid) / 3)
    assert metrics.mINP == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
    assert metrics.cmc == pytest.approx({1: 1 / 3, 5: 1.0, 10: 1.0, 20: 1.0})
    assert (metrics.total, metrics.scored) == (3, 3)
    assert_same(metrics, slow(DISTANCES, QUERY_IDS, QUERY_CAMS, GALLERY_IDS, GALLERY_CAMS))


@pytest.mark.parametrize(
    ("matches_at", "gallery", "step", "trapezoid", "inp", "cmc"),
    [
        ([1], 1, 1.0, 1.0, 1.0, [1, 1, 1, 1]),
        ([2], 2, 1 / 2, 1 / 4, 1 / 2, [0, 1, 1, 1]),  # reid.md: 0.5 by step, 0.25 by trapezoid
        ([1, 2, 3], 9, 1.0, 1.0, 1.0, [1, 1, 1, 1]),
        # Zheng et al. 2015, figure 4: equal in CMC, apart in AP
        ([1, 3], 5, (1 + 2 / 3) / 2, (1 + (1 / 2 + 2 / 3) / 2) / 2, 2 / 3, [1, 1, 1, 1]),
        ([1, 5], 5, (1 + 2 / 5) / 2, (1 + (1 / 4 + 2 / 5) / 2) / 2, 2 / 5, [1, 1, 1, 1]),
        ([6, 7], 30, (1 / 6 + 2 / 7) / 2, ((0 + 1 / 6) / 2 + (1 / 6 + 2 / 7) / 2) / 2, 2 / 7, [0, 0, 1, 1]),
        ([20], 20, 1 / 20, 1 / 40, 1 / 20, [0, 0, 0, 1]),
        ([21, 22], 30, (1 / 21 + 2 / 22) / 2, (1 / 42 + (1 / 21 + 2 / 22) / 2) / 2, 2 / 22, [0, 0, 0, 0]),
    ],
)
def test_known_figures(matches_at, gallery, step, trapezoid, inp, cmc):
    distances = np.arange(1.0, gallery + 1)[None]
    identities = [1 if place in matches_at else 2 for place in range(1, gallery + 1)]
    shuffled = np.random.default_rng(0).permutation(gallery)
    for order in (np.arange(gallery), shuffled):
        metrics = metrics_from_distances(distances[:, order], [1], [1], np.array(identities)[order], [2] * gallery)
        found = [metrics.mAP, metrics.mAP_trapezoid, metrics.mINP, *metrics.cmc.values()]
        assert found == pytest.approx([step, trapezoid, inp, *cmc], abs=1e-15)


def test_queries_without_a_match_are_counted_and_either_denominator_can_be_had():
    given_ = (np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]), [1, 7, 2, -1], [1, 1, 2, 1], [1, 2], [2, 2])
    scored = metrics_from_distances(*given_)  # identity 7 is nowhere, 2 under its own camera alone, -1 is nobody
    assert (scored.mAP, scored.cmc[1], scored.total, scored.scored, scored.denominator) == (1.0, 1.0, 4, 1, "scored")
    everyone = metrics_from_distances(*given_, denominator="all")
    assert (everyone.mAP, everyone.mAP_trapezoid, everyone.mINP, everyone.cmc[20]) == (0.25, 0.25, 0.25, 0.25)
    assert (everyone.total, everyone.scored, everyone.denominator) == (4, 1, "all")
    features = np.eye(4), given_[1], given_[2], np.eye(4)[:2], given_[3], given_[4]
    assert retrieval_metrics(*features, denominator="all").mAP == retrieval_metrics(*features).mAP / 4
    with pytest.raises(UserError, match="^unknown denominator 'al'; did you mean 'all'\\? known: all, scored$"):
        retrieval_metrics(*features, denominator="al")


def test_a_result_as_json():
    assert metrics_from_distances(np.array([[1.0, 2.0]]), [1], [1], [2, 1], [2, 2], "veri").to_dict() == {
        "mAP": 0.5, "mAP_trapezoid": 0.25, "mINP": 0.5, "cmc": {"1": 0.0, "5": 1.0, "10": 1.0, "20": 1.0}, "total": 1,
        "scored": 1, "protocol": "veri", "denominator": "scored", "repeats": 1, "std": None, "unreadable": 0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- against the twins
def random_case(seed, queries, gallery, levels, dims=2):
    """Small whole numbers: distances are exact, and ties, junk, distractors and unmatched queries abound."""
    rng = np.random.default_rng(seed)
    q, g = rng.integers(0, levels, (queries, dims)), rng.integers(0, levels, (gallery, dims))
    qi, gi = rng.integers(-1, 5, queries), rng.integers(-1, 4, gallery)
    qc, gc = rng.integers(0, 3, queries), rng.integers(0, 3, gallery)
    return q, qi, qc, g, gi, gc


@settings(deadline=None, max_examples=1500)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    gallery=st.integers(1, 30),
    levels=st.integers(1, 4),
    protocol=st.sampled_from(["market1501", "veri", "plain"]),
    denominator=st.sampled_from(["scored", "all"]),
    memory=st.sampled_from([1, 2000, 1 << 28]),
)
def test_equal_to_the_twin_with_ties_junk_distractors_and_unmatched_queries(
    seed, queries, gallery, levels, protocol, denominator, memory
):
    q, qi, qc, g, gi, gc = random_case(seed, queries, gallery, levels)
    distances = ((q[:, None] - g[None]) ** 2).sum(2)
    expected = slow(distances, qi, qc, gi, gc, protocol, denominator)
    options = {"protocol": protocol, "denominator": denominator}
    if expected is None:
        with pytest.raises(UserError, match="nothing can be scored"):
            retrieval_metrics(q, qi, qc, g, gi, gc, memory=memory, **options)
    else:
        assert_same(retrieval_metrics(q, qi, qc, g, gi, gc, memory=memory, **options), expected)
        assert_same(metrics_from_distances(distances, qi, qc, gi, gc, **options), expected)


def features_of(kind, rng, count, dims):
    """Features whose distances single precision cannot order, in one way or another."""
    x = rng.standard_normal((count, dims))
    if kind == "duplicates":
        x[count // 2 :] = x[rng.permutation(count)[: count - count // 2]]
    elif kind == "collapsed":
        x = np.full((count, dims), 0.1)
    elif kind == "nearly collapsed":
        x = 3 + 1e-6 * x
    elif kind == "far from the origin":
        x = 1000 + x
    elif kind == "one outlier":
        x[-1] *= 1e6
    elif kind == "tiny":
        x = 1e-22 * x
    elif kind == "some zero":
        x[rng.random(count) < 0.2] = 0
    elif kind == "large":
        x = 1e16 * x
    return x


KINDS = (
    "random", "duplicates", "collapsed", "nearly collapsed", "far from the origin", "one outlier", "tiny", "large",
    "some zero",
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    dims=st.sampled_from([1, 3, 13, 64]),
    dtype=st.sampled_from(["float32", "float64"]),
    metric=st.sampled_from(["euclidean", "cosine"]),
    memory=st.sampled_from([1, 3000, 1 << 28]),
)
def test_ranks_are_those_of_double_precision(seed, kind, dims, dtype, metric, memory):
    rng = np.random.default_rng(seed)
    x = features_of(kind, rng, 7 + 60, dims).astype(dtype)
    q, g = x[:7], x[7:]
    if metric == "cosine" and kind in ("nearly collapsed", "far from the origin") or metric == "cosine" and dims == 1:
        return  # directions that differ by less than their own rounding: the twin is no truth either
    tags = rng.integers(0, 4, 7), rng.integers(0, 3, 7), rng.integers(-1, 4, 60), rng.integers(0, 3, 60)
    rankings = reference.ranked_matches(
        [[reference.distance(a, b, metric) for b in g] for a in q], *(tag.tolist() for tag in tags)
    )
    assert ranks(q, g, tags, metric, memory) == reference.ranks_of_matches(rankings)


def ranks(q, g, tags, metric="euclidean", memory=1 << 28):
    sides = Tags.of(tags[0], tags[1], None, "query"), Tags.of(tags[2], tags[3], None, "gallery")
    [[part]] = find_draws(*sides, PROTOCOLS["market1501"])
    found = ranks_of_features(Features.of(q, "query"), Features.of(g, "gallery"), metric, part, memory)
    return [rank.tolist() for rank in found]


@pytest.mark.parametrize("count", [9, 2000])
def test_vectors_of_one_direction_tie_under_the_cosine(count):
    """Whatever their lengths. A vector of zeros has none: a cosine of 0, and a query of zeros ranks by gallery order."""
    rng = np.random.default_rng(count)
    direction = rng.standard_normal(24)
    g = direction * rng.integers(1, 1000, (count, 1))
    g[0] = 0
    matches = np.flatnonzero(rng.random(count) < 0.3)
    ids = np.where(np.isin(np.arange(count), matches), 1, 2)
    q = rng.standard_normal((1, 24))
    q *= np.sign(q @ direction)[:, None]
    tags = [1], [1], ids, [2] * count
    assert ranks(q, g, tags, "cosine") == [sorted(count if m == 0 else int(m) for m in matches)]
    assert ranks(-q, g, tags, "cosine") == ranks(0 * q, g, tags, "cosine") == [(matches + 1).tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_gallery_takes_the_ways_of_the_large_ones(kind, monkeypatch):
    """Bins instead of a sort, crowds settled by themselves, whole rows in double precision; in blocks, by two threads."""
    rng = np.random.default_rng(5)
    x = features_of(kind, rng, 40 + 3000, 16).astype(np.float32)
    q, g = x[:40], x[40:]
    tags = rng.integers(0, 60, 40), rng.integers(0, 4, 40), rng.integers(-1, 60, 3000), rng.integers(0, 4, 3000)
    distances = ((q[:, None].astype(np.float64) - g[None]) ** 2).sum(2)
    expected = reference.ranks_of_matches(reference.ranked_matches(distances.tolist(), *(t.tolist() for t in tags)))
    taken = set()
    for name in ("_around", "_Space.settle", "_Space.double"):
        owner, attribute = (ranking._Space, name.split(".")[1]) if "." in name else (ranking, name)
        original = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *a, f=original, n=name: (taken.add(n), f(*a))[1])
    torch.set_num_threads(2)
    assert ranks(q, g, tags) == expected
    assert ranks(q, g, tags, memory=12 * 3000 * 3) == expected
    settled, whole = "_Space.settle" in taken, "_Space.double" in taken
    assert "_around" in taken or kind == "collapsed"  # there the farthest positive is as near as the nearest
    directly = kind in ("random", "duplicates", "one outlier", "large")
    assert settled or not directly
    assert whole != directly


def test_a_lower_precision_that_the_program_allows_changes_nothing():
    rng = np.random.default_rng(2)
    q, g = rng.standard_normal((20, 64)).astype(np.float32), rng.standard_normal((400, 64)).astype(np.float32)
    tags = rng.integers(0, 6, 20), rng.integers(0, 3, 20), rng.integers(0, 6, 400), rng.integers(0, 3, 400)
    expected = ranks(q, g, tags)
    torch.set_float32_matmul_precision("medium")
    try:
        assert ranks(q, g, tags) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("noise", [0.3, 3.0, 100.0])
def test_equal_to_the_twin_on_random_embeddings(metric, noise):
    rng = np.random.default_rng(7)
    centres = rng.standard_normal((12, 16))
    qi, gi = rng.integers(0, 12, 40), np.append(rng.integers(0, 10, 300), np.full(30, -1))
    qc, gc = rng.integers(0, 4, 40), rng.integers(0, 4, 330)
    q, g = (np.float32(centres[i] + noise * rng.standard_normal((len(i), 16))) for i in (qi, gi))
    expected = slow([[reference.distance(a, b, metric) for b in g] for a in q], qi, qc, gi, gc)
    assert expected["scored"] < expected["total"] == 40  # identities 10 and 11 are in no gallery image
    assert_same(retrieval_metrics(q, qi, qc, g, gi, gc, metric=metric, memory=10_000), expected)
    tensors = [torch.from_numpy(np.asarray(x)) for x in (q, qi, qc, g, gi, gc)]
    assert_same(retrieval_metrics(*tensors, metric=metric), expected)


def test_blocks_are_sized_to_the_memory(monkeypatch):
    shapes = []
    single = ranking._Space.single
    monkeypatch.setattr(ranking._Space, "single", lambda self, a, out: (shapes.append(out.shape), single(self, a, out))[1])
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal((2, 600, 4)).astype(np.float32)
    arguments = q, [1] * 600, [1] * 600, g, [1] * 600, [2] * 600
    whole = retrieval_metrics(*arguments)
    assert {shape[0] for shape in shapes} == {256, 88}  # no more rows than a block needs, whatever the memory
    shapes.clear()
    assert retrieval_metrics(*arguments, memory=12 * 600 * 50) == whole
    assert {shape[0] for shape in shapes} == {50}
    shapes.clear()
    assert retrieval_metrics(*arguments, memory=0) == whole
    assert {shape[0] for shape in shapes} == {1}


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), infinite=st.floats(0, 0.5))
def test_blocks_of_distances_equal_the_whole_and_inf_ranks_last(seed, rows, infinite):
    rng = np.random.default_rng(seed)
    _, qi, qc, _, gi, gc = random_case(seed, 9, 30, 3)
    distances = rng.integers(0, 6, (9, 30)).astype(rng.choice(["float32", "float64"]))
    distances[rng.random((9, 30)) < infinite] = np.inf
    expected = slow(distances, qi, qc, gi, gc)
    if expected is None:
        return
    assert_same(metrics_from_distances(distances, qi, qc, gi, gc), expected)
    blocks = ((start, torch.from_numpy(distances[start : start + rows])) for start in range(0, 9, rows))
    assert_same(metrics_from_blocks(blocks, qi, qc, gi, gc), expected)


def test_distances_far_apart_and_infinite_in_a_long_row():
    """More before the last match than a sort is meant for, and values that cannot be told apart by bins."""
    rng = np.random.default_rng(0)
    for row in (
        10.0 ** rng.integers(-300, 300, 2000),
        np.where(rng.random(2000) < 0.3, np.inf, rng.random(2000)),
        np.where(rng.random(2000) < 0.01, -np.inf, rng.random(2000)),
        np.zeros(2000),
        rng.random(2000) * 1e-310,
        rng.integers(0, 3, 2000).astype(float),
    ):
        ids, cams = rng.integers(0, 50, 2000), rng.integers(0, 3, 2000)
        for dtype in (np.float32, np.float64):
            with np.errstate(over="ignore"):
                given_ = row[None].astype(dtype)
            expected = slow(given_, [1], [1], ids, cams)
            assert_same(metrics_from_distances(given_, [1], [1], ids, cams), expected)


def test_distractors_lower_the_rank_and_junk_does_not():
    q, g = np.zeros((1, 1)), np.array([[1.0], [2.0], [3.0]])
    with_distractor = retrieval_metrics(q, [1], [1], g, [0, 0, 1], [2, 2, 2])
    with_junk = retrieval_metrics(q, [1], [1], g, [-1, -1, 1], [2, 2, 2])
    assert (with_distractor.mAP, with_junk.mAP) == (1 / 3, 1.0)


def test_features_are_left_as_they_were_and_need_not_be_writable():
    q, g = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    kept = q.copy(), g.copy()
    q.flags.writeable = g.flags.writeable = False
    tags = [1] * 5, [1] * 5, [1, 1, -1, 2, 1], [1, 2, 3, 4, 5]
    expected = retrieval_metrics(q, *tags[:2], g, *tags[2:], metric="cosine")
    assert np.array_equal(q, kept[0]) and np.array_equal(g, kept[1])
    for change in (
        lambda x: x.astype(">f4"), lambda x: np.asfortranarray(x), lambda x: x[:, ::-1], lambda x: x.tolist(),
        lambda x: torch.tensor(x, requires_grad=True), lambda x: x.astype(np.longdouble), lambda x: torch.tensor(x) * 1.0,
    ):  # fmt: skip
        assert retrieval_metrics(change(q), *tags[:2], change(g), *tags[2:], metric="cosine") == expected


# ---------------------------------------------------------------------------------------- protocols
def test_the_protocols_by_name():
    assert list(PROTOCOLS) == [
        "market1501", "msmt17", "cuhk03-np", "cuhk03-classic", "veri", "vehicleid/test-800", "vehicleid/test-1600",
        "vehicleid/test-2400", "vehicleid/test-3200", "vehicleid/test-6000", "vehicleid/test-13164", "vric", "veri-wild",
        "mars", "plain",
    ]  # fmt: skip
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    without = [name for name, protocol in PROTOCOLS.items() if not protocol.remove_same_camera]
    assert without == [*(name for name in PROTOCOLS if name.startswith("vehicleid/")), "plain"]
    assert {n for n, p in PROTOCOLS.items() if p.drawn} == {"cuhk03-classic", *without[:-1]}
    assert find_protocol("veri") is find_protocol(PROTOCOLS["veri"]) is PROTOCOLS["veri"]


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if not protocol.drawn])
def test_a_result_names_its_protocol_and_follows_its_rule(name):
    q, qi, qc, g, gi, gc = random_case(3, 9, 30, 3)
    metrics = retrieval_metrics(q, qi, qc, g, gi, gc, protocol=name)
    assert (metrics.protocol, metrics.repeats, metrics.std) == (name, 1, None)
    assert_same(metrics, slow(((q[:, None] - g[None]) ** 2).sum(2), qi, qc, gi, gc, name))


def test_veri_is_what_its_own_index_files_list(tmp_path):
    """Line n of gt_index.txt / jk_index.txt: the good and the junk images of query n, as 1-based rows of name_test.txt."""
    query = ["0002_c002_00030600_0.jpg", "0002_c012_00030700_1.jpg", "0005_c001_00000100_0.jpg"]
    test = [
        "0002_c002_00030600_0.jpg", "0002_c002_00030605_0.jpg", "0002_c003_00030650_0.jpg", "0002_c012_00030700_1.jpg",
        "0005_c001_00000100_0.jpg", "0005_c011_00000110_0.jpg", "0007_c002_00000001_0.jpg", "0005_c001_00000120_0.jpg",
    ]  # fmt: skip
    (tmp_path / "gt_index.txt").write_text("3 4 \n1 2 3 \n6 \n")
    (tmp_path / "jk_index.txt").write_text("1 2 \n4 \n5 8 \n")

    def listed(name):
        return [[int(n) - 1 for n in line.split()] for line in (tmp_path / name).read_text().splitlines()]

    def tags(names, side):
        return Tags.of([int(n[:4]) for n in names], [int(n[6:9]) for n in names], None, side)

    matches = find_matches(tags(query, "query"), tags(test, "gallery"), PROTOCOLS["veri"])
    good, junk = zip(*(matches.of_query(q) for q in range(3)), strict=True)
    assert [sorted(columns.tolist()) for columns in good] == listed("gt_index.txt")
    assert [sorted(columns.tolist()) for columns in junk] == listed("jk_index.txt")


def test_mars_keeps_the_query_tracks_in_the_gallery():
    """Its query tracks are gallery tracks too: 12,180 less the junk. The rule leaves out the own one, no other."""
    tracks = np.array([[0.0], [1.0], [2.0], [3.0]])
    ids, cams = np.array([1, 1, 0, 2]), np.array([1, 2, 1, 1])
    metrics = retrieval_metrics(tracks[[0, 1]], ids[[0, 1]], cams[[0, 1]], tracks, ids, cams, protocol="mars")
    assert (metrics.mAP, metrics.scored) == (1.0, 2)  # each finds the other one, though both are queries


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 25), levels=st.integers(1, 4))
def test_vehicleid_equals_the_twin_draw_by_draw(seed, images, levels):
    rng = np.random.default_rng(seed)
    x, ids = rng.integers(0, levels, (images, 2)), rng.integers(0, 6, images)
    distances = ((x[:, None] - x[None]) ** 2).sum(2)
    draws = [reference.figures(reference.vehicleid_draw(distances.tolist(), ids.tolist(), d)) for d in range(10)]
    if draws[0] is None:
        with pytest.raises(UserError, match="has a second image of its identity, so nothing can be scored"):
            retrieval_metrics(x, ids, None, x, ids, None, protocol="vehicleid/test-800")
        return
    expected = reference.over_draws(draws)
    metrics = retrieval_metrics(x, ids, None, x, ids, None, protocol="vehicleid/test-800")
    assert_same(metrics, expected)
    assert metrics.total == metrics.scored == images - len(set(ids.tolist()))
    assert_same(metrics_from_distances(distances, ids, None, ids, None, "vehicleid/test-800"), expected)


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), queries=st.integers(1, 9), gallery=st.integers(1, 30), cameras=st.integers(2, 3),
       denominator=st.sampled_from(["scored", "all"]))
def test_cuhk03_classic_equals_the_twin_draw_by_draw(seed, queries, gallery, cameras, denominator):
    q, qi, qc, g, gi, gc = random_case(seed, queries, gallery, 3)
    qc, gc = qc % cameras, gc % cameras
    distances = ((q[:, None] - g[None]) ** 2).sum(2)
    tags = [x.tolist() for x in (qi, qc, gi, gc)]
    rankings = [reference.single_shot_draw(distances.tolist(), *tags, draw) for draw in range(10)]
    draws = [reference.figures(ranking, denominator) for ranking in rankings]
    options = {"protocol": "cuhk03-classic", "denominator": denominator}
    if draws[0] is None:
        with pytest.raises(UserError, match="nothing can be scored"):
            retrieval_metrics(q, qi, qc, g, gi, gc, **options)
        return
    metrics = retrieval_metrics(q, qi, qc, g, gi, gc, **options)
    assert_same(metrics, reference.over_draws(draws))
    assert metrics.mAP == pytest.approx(metrics.mINP)  # one match each
    assert_same(metrics_from_distances(distances, qi, qc, gi, gc, **options), reference.over_draws(draws))


def test_draws_are_the_same_everywhere():
    """What PCG64 gives for the seeds 0, 1 and 2, in any version on any machine."""
    ids = np.repeat([3, 1, 2], 4)
    tags = Tags.of(ids, None, None, "query")
    drawn = [part.gallery.tolist() for [part] in find_draws(tags, tags, PROTOCOLS["vehicleid/test-800"])]
    assert drawn[:3] == [[3, 6, 11], [2, 4, 9], [3, 7, 11]]
    assert len(drawn) == 10 and len({tuple(shots) for shots in drawn}) > 5
    [first] = find_draws(tags, tags, PROTOCOLS["vehicleid/test-800"])[0]
    assert first.queries.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]


def test_a_protocol_of_ones_own():
    q, g = np.zeros((1, 1)), np.array([[1.0], [2.0]])
    assert retrieval_metrics(q, [1], None, g, [7, 1], None, protocol="plain").mAP == 0.5
    mine = Protocol("mine", drop_identities=(7,), remove_same_camera=False)
    metrics = retrieval_metrics(q, [1], None, g, [7, 1], None, protocol=mine)
    assert (metrics.mAP, metrics.protocol) == (1.0, "mine")
    once = dataclasses.replace(PROTOCOLS["vehicleid/test-800"], draws=1)
    x = np.eye(4)
    single = retrieval_metrics(x, [1, 1, 2, 2], None, x, [1, 1, 2, 2], None, protocol=once)
    assert (single.repeats, single.std, single.total) == (1, None, 2)


# ---------------------------------------------------------------------------------------- mistakes, word by word
def refused(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_why_nothing_can_be_scored():
    eye = np.eye(2)
    assert refused(retrieval_metrics, eye, [1, 2], [4, 4], eye, [1, 2], [4, 4], protocol="msmt17") == (
        "every gallery image of the queries' identities has camera 4, and protocol 'msmt17' leaves out what the query's "
        "own camera took, so nothing can be scored; give the true cameras, or use --protocol plain to ignore them"
    )
    assert retrieval_metrics(eye, [1, 2], [4, 4], eye, [1, 2], [4, 4], protocol="plain").mAP == 1.0
    assert refused(retrieval_metrics, eye, [1, 2], [1, 2], eye, [1, 2], [1, 2]) == (
        "none of the 2 queries has a gallery image of its identity from another camera, so nothing can be scored; give "
        "the true cameras, or use --protocol plain to ignore them"
    )
    assert refused(metrics_from_distances, eye, [1, -1], [1, 1], [3, -1], [2, 2]) == (
        "none of the 2 queries has a gallery image of its identity, so nothing can be scored; number the identities of "
        "query and gallery by one list"
    )
    assert refused(metrics_from_distances, eye, [1, 2], None, [1, 2], None, "vehicleid/test-800") == (
        "none of the 2 queries has a second image of its identity, so nothing can be scored; give a list with at least "
        "two images of some identity"
    )


def test_one_camera_for_all_answers_is_said_though_some_queries_are_scored():
    """A gallery by one camera: the queries by that camera are lost, and the figures are of the others alone."""
    def line(qi, qc, gi, gc, protocol="market1501"):
        return one_camera(Tags.of(qi, qc, None, "query"), Tags.of(gi, gc, None, "gallery"), PROTOCOLS[protocol])

    query, gallery = ([1, 2, 3, 4], [1, 1, 1, 2]), ([1, 2, 3, 4, -1, 0], [1, 1, 1, 1, 5, 6])  # junk, who is not asked for
    assert line(*query, *gallery) == (
        "every gallery image of the queries' identities has camera 1, and protocol 'market1501' leaves out what the "
        "query's own camera took, so only 1 of 4 queries can be scored; give the true cameras, or use --protocol plain to "
        "ignore them"
    )
    assert metrics_from_distances(np.ones((4, 6)), *query, *gallery).scored == 1
    assert line([1, 2], [2, 3], [1, 2], [1, 1]) == ""  # two views: everybody is answered
    assert line([1, 5], [1, 2], [1, 2, 5], [1, 2, 3]) == ""
    assert line([7], [1], [1, 2], [1, 1]) == ""  # nobody who is asked for
    assert line([1], None, [1], None, "plain") == ""
    # all queries lost, though not all by one camera
    assert refused(metrics_from_distances, np.ones((3, 2)), [1, 2, 9], [4, 4, 5], [1, 2], [4, 4]).startswith(
        "every gallery image of the queries' identities has camera 4, and protocol 'market1501' leaves out what"
    )


def test_under_plain_a_query_does_not_find_itself():
    """Pictures of one number on both sides are one: it is no part of its own ranking, and every other is a match."""
    rule, identities = PROTOCOLS["plain"], [1, 1, 2, 3]
    side = [Tags.of(identities, None, None, name, pictures=[10, 11, 12, 13]) for name in ("query", "gallery")]
    matches = find_matches(*side, rule)
    assert [[part.tolist() for part in matches.of_query(q)] for q in range(4)] == [
        [[1], [0]], [[0], [1]], [[], [2]], [[], [3]]
    ]  # fmt: skip
    assert matches.scored().tolist() == [0, 1]
    assert side[0].take(np.array([3, 1])).pictures.tolist() == [13, 11]
    other = Tags.of(identities, None, None, "gallery", pictures=[20, 21, 22, 23])
    assert find_matches(side[0], other, rule).scored().tolist() == [0, 1, 2, 3]
    by_camera = Tags.of(identities, [1, 2, 1, 1], None, "query", pictures=[10, 11, 12, 13])
    assert find_matches(by_camera, by_camera, PROTOCOLS["veri"]).scored().tolist() == [0, 1]  # cameras rule
    alone = [Tags.of([1, 2], None, None, name, pictures=[5, 6]) for name in ("query", "gallery")]
    assert str(nothing_scored(*alone, rule)) == (
        "none of the 2 queries has a gallery image of its identity beside itself, so nothing can be scored; give at least "
        "two images of some identity"
    )


def test_a_drawn_list_must_be_one_list():
    message = (
        "protocol 'vehicleid/test-800' draws its gallery from one list of all test images: give the same list as query "
        "and as gallery, or use --protocol plain where the gallery is drawn already"
    )
    eye, tags = np.eye(3), ([1, 1, 2], None)
    assert refused(retrieval_metrics, eye, *tags, eye[:2], [1, 1], None, protocol="vehicleid/test-800") == message
    assert refused(retrieval_metrics, eye, *tags, eye, [1, 2, 2], None, protocol="vehicleid/test-800") == message
    assert refused(retrieval_metrics, eye, *tags, 2 * eye, *tags, protocol="vehicleid/test-800") == message


NOT_FINITE = (
    "features hold NaN or infinite numbers in row 1{}, counting from 0; the network diverged or was fed such images: "
    "extract them again from a good checkpoint"
)
TOO_LARGE = (
    "query features are too large in row 0 (and 1 more): a row's length is at most 1e+18; divide all features of query "
    "and gallery by one number"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cosin"}, "unknown metric 'cosin'; did you mean 'cosine'? known: cosine, euclidean"),
        ({"protocol": "market"}, "unknown protocol 'market'; did you mean 'market1501'? known: "
         + ", ".join(sorted(PROTOCOLS))),
        ({"g": np.eye(3)}, "query features have 2 dimensions and gallery features 3; both must come from the same "
         "network"),
        ({"q": np.zeros(2)}, "query features must be N x D with at least one row, got shape (2,); store one row per "
         "image"),
        ({"q": np.zeros((0, 2))}, "query features must be N x D with at least one row, got shape (0, 2); store one row "
         "per image"),
        ({"g": np.zeros((0, 2))}, "gallery features must be N x D with at least one row, got shape (0, 2); store one row "
         "per image"),
        ({"q": np.array([["a", "b"]] * 2)}, "query features must be numbers (N x D floats), got dtype <U1"),
        ({"q": torch.eye(2).bool()}, "query features must be numbers (N x D floats), got dtype torch.bool"),
        ({"q": [[1.0], [1.0, 2.0]]}, "query features must be N x D numbers, but the rows differ in length"),
        ({"q": np.array([[0, 1], [np.nan, 1]])}, "query " + NOT_FINITE.format("")),
        ({"g": torch.tensor([[0, 1], [1, torch.inf], [torch.nan, 0]]), "gi": [1, 2, 2], "gc": [1, 1, 1]},
         "gallery " + NOT_FINITE.format(" (and 1 more)")),
        ({"q": np.full((2, 2), 1e20)}, TOO_LARGE),
        ({"q": np.full((2, 2), 1e300)}, TOO_LARGE),
        ({"gi": [1]}, "gallery identities must be 2 integers, one per feature row, got shape (1,) of int64"),
        ({"qi": [1, 2, 3]}, "query identities must be 2 integers, one per feature row, got shape (3,) of int64"),
        ({"qi": [[1], [2]]}, "query identities must be 2 integers, one per feature row, got shape (2, 1) of int64"),
        ({"qi": ["a", "b"]}, "query identities must be 2 integers, one per feature row, got shape (2,) of <U1"),
        ({"qi": [[1], [2, 3]]}, "query identities must be a flat list of integers, one per feature row"),
        ({"gi": torch.tensor([1.0, 2.0])}, "gallery identities must be 2 integers, one per feature row, got shape (2,) "
         "of float32; store them as identities.astype('int64')"),
        ({"qc": [0.5, 1.5]}, "query cameras must be 2 integers, one per feature row, got shape (2,) of float64; store "
         "them as cameras.astype('int64')"),
        ({"gc": None}, "protocol 'market1501' needs cameras; give them, or use --protocol plain"),
        ({"gc": None, "protocol": "cuhk03-classic"}, "protocol 'cuhk03-classic' needs cameras; give them, or use "
         "--protocol plain"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, message):
    given_ = {"q": np.eye(2), "qi": [1, 2], "qc": [0, 0], "g": np.eye(2), "gi": [1, 2], "gc": [1, 1], **change}
    options = {name: given_.pop(name) for name in ("metric", "protocol") if name in given_}
    assert refused(retrieval_metrics, *given_.values(), **options) == message


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.ones((2, 3)), "distances must be numbers, a row for each of 2 queries and a column for each of 2 gallery "
         "images, got shape (2, 3) of float64"),
        (np.ones((3, 2)), "distances must be numbers, a row for each of 2 queries and a column for each of 2 gallery "
         "images, got shape (3, 2) of float64"),
        (np.array([["a", "b"]] * 2), "distances must be numbers, a row for each of 2 queries and a column for each of 2 "
         "gallery images, got shape (2, 2) of <U1"),
        (np.array([[1.0, 2.0], [1.0, np.nan]]), "distances hold NaN in row 1, counting from 0; check the features that "
         "they come from, and mark what must rank last with inf"),
        (np.ones((1, 2)), "query 1 of 2 has 0 rows of distances, must have 1; give each query's distances once"),
    ],
)
def test_distances_that_cannot_be_used(distances, message):
    assert refused(metrics_from_distances, distances, [1, 2], [1, 1], [1, 2], [2, 2]) == message


def test_no_images():
    message = "there are no {0} images ({0} identities are empty); check the dataset, or the file they are from"
    assert refused(metrics_from_distances, np.ones((0, 1)), [], [], [1], [1]) == message.format("query")
    assert refused(metrics_from_distances, np.ones((1, 0)), [1], [1], [], []) == message.format("gallery")


def test_blocks_that_overlap_or_overrun():
    tags = [1, 2], [1, 1], [1, 2], [2, 2]
    block = np.eye(2)
    assert refused(metrics_from_blocks, [(0, block), (1, block[:1])], *tags) == (
        "query 1 of 2 has 2 rows of distances, must have 1; give each query's distances once"
    )
    assert refused(metrics_from_blocks, [(1, block)], *tags) == (
        "distances must be numbers, a row for each of 2 queries and a column for each of 2 gallery images, got shape "
        "(2, 2) of float64 from row 1 on"
    )


# ---------------------------------------------------------------------------------------- files, and another device
def test_score_reads_two_files(tmp_path):
    rng = np.random.default_rng(1)
    arrays = []
    for name, count in (("q", 6), ("g", 20)):
        parts = rng.standard_normal((count, 4)), rng.integers(0, 3, count), rng.integers(0, 3, count)
        np.savez(tmp_path / f"{name}.npz", features=parts[0], identities=parts[1], cameras=parts[2])
        np.savez(tmp_path / f"{name}-plain.npz", features=parts[0], identities=parts[1])
        arrays += parts
    q, g, q_plain, g_plain = (tmp_path / f"{name}.npz" for name in ("q", "g", "q-plain", "g-plain"))
    assert score(q, g) == retrieval_metrics(*arrays)
    plain = score(q_plain, g_plain, protocol="plain", metric="cosine", denominator="all")
    assert plain == retrieval_metrics(*arrays, protocol="plain", metric="cosine", denominator="all")
    drawn = score(g_plain, g_plain, protocol="vehicleid/test-800")
    assert drawn.repeats == 10 and drawn == retrieval_metrics(*arrays[3:], *arrays[3:], protocol="vehicleid/test-800")
    assert refused(score, q_plain, g) == (
        f"{q_plain} has no array 'cameras' (it holds features, identities); store it, or use --protocol plain to ignore "
        "cameras"
    )


def test_score_names_files_it_cannot_use(tmp_path):
    wanted = "give an .npz with features (N x D), identities (N) and cameras (N), as numpy.savez writes"
    assert refused(score, tmp_path / "none.npz", tmp_path / "none.npz") == f"no file {tmp_path / 'none.npz'}; {wanted}"
    text, single, objects, empty = (tmp_path / n for n in ("text.npz", "one.npy", "objects.npz", "empty.npz"))
    text.write_text("hello")
    np.save(single, np.eye(2))
    np.savez(objects, features=np.array([{}], dtype=object))
    empty.touch()
    for path in (text, single, objects, empty):
        assert refused(score, path, path) == f"{path} cannot be read as arrays of numbers; {wanted}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_cuda(kind):
    rng = np.random.default_rng(3)
    x = features_of(kind, rng, 50 + 3000, 32).astype(np.float32)
    tags = [rng.integers(-1, 9, n) for n in (50, 50, 3000, 3000)]
    on_cuda = ranks(torch.tensor(x[:50]).cuda(), torch.tensor(x[50:]).cuda(), tags)
    assert on_cuda == ranks(x[:50], x[50:], tags)

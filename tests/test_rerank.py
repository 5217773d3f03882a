"""Re-ranking and query expansion: by hand, against the slow twins, in bounded blocks, and what they say to a mistake."""

import math
import tracemalloc

import numpy as np
import pytest
import reference_rerank as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreid import rerank as module
from autoreid.errors import UserError
from autoreid.metrics import metrics_from_distances, retrieval_metrics
from autoreid.rerank import expand_queries, rerank, reranked_blocks

KINDS = ("ties", "gauss", "duplicates", "clusters")


def features(seed, kind, queries, gallery, dims, scale=1.0):
    """Queries and gallery: whole numbers full of ties, all different, repeated far from the origin, or in clusters."""
    rng = np.random.default_rng(seed)
    count = queries + gallery
    centres = rng.standard_normal((4, dims))
    x = {
        "ties": lambda: rng.integers(0, 3, (count, dims)).astype(float),
        "gauss": lambda: rng.standard_normal((count, dims)),
        "duplicates": lambda: (centres + 100)[rng.integers(0, 4, count)],
        "clusters": lambda: (centres[rng.integers(0, 4, count)] + 0.2 * rng.standard_normal((count, dims))) * scale,
    }[kind]()
    return x[:queries], x[queries:]


cases = {
    "seed": st.integers(0, 10**6),
    "kind": st.sampled_from(KINDS),
    "queries": st.integers(1, 7),
    "gallery": st.integers(1, 28),
    "dims": st.integers(1, 5),
    "single": st.booleans(),
    "memory": st.sampled_from([1, 2000, 1 << 28]),
}


@settings(deadline=None, max_examples=200)
@given(
    **cases,
    k1=st.integers(1, 25),
    k2=st.integers(1, 9),
    lam=st.sampled_from([0, 0.3, 0.7, 1]),
    metric=st.sampled_from(["euclidean", "cosine"]),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
)
def test_equal_to_the_twin(seed, kind, queries, gallery, dims, single, memory, k1, k2, lam, metric, scale):
    q, g = features(seed, kind, queries, gallery, dims, scale)
    if single:
        q, g = q.astype(np.float32), g.astype(np.float32)
    expected = reference.rerank(q.tolist(), g.tolist(), k1, k2, lam, metric)
    final = rerank(q, g, k1, k2, lam, metric, memory)
    assert final.dtype == np.float32 and final.shape == (queries, gallery)
    np.testing.assert_allclose(final, expected, atol=2e-6, rtol=0)


@settings(deadline=None, max_examples=100)
@given(**cases, k=st.integers(1, 12), alpha=st.sampled_from([0, 1, 3, 2.5]))
def test_query_expansion_is_equal_to_the_twin(seed, kind, queries, gallery, dims, single, memory, k, alpha):
    q, g = features(seed, kind, queries, gallery, dims)
    if single:
        q, g = q.astype(np.float32), g.astype(np.float32)
    expected = reference.expand_queries(q.tolist(), g.tolist(), k, alpha)
    expanded = expand_queries(q, g, k, alpha, memory)
    assert expanded.dtype == np.float32 and expanded.shape == (queries, dims)
    np.testing.assert_allclose(expanded, expected, atol=2e-6, rtol=0)


def people(seed=0, identities=6, each=20, dims=16, queries=12):
    """Unit features of identities that each drift along their own line, so that neighbours of neighbours help."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(identities), each)
    start, drift = rng.standard_normal((2, identities, dims))
    x = start[ids] + drift[ids] * rng.uniform(-1, 1, len(ids))[:, None] + 0.1 * rng.standard_normal((len(ids), dims))
    x = np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
    order = rng.permutation(len(ids))
    return x[order[:queries]], ids[order[:queries]], x[order[queries:]], ids[order[queries:]]


def test_the_papers_settings_at_120_images_and_what_they_are_for():
    q, qi, g, gi = people()
    final = rerank(q, g)
    np.testing.assert_allclose(final, reference.rerank(q.tolist(), g.tolist(), 20, 6, 0.3), atol=2e-6, rtol=0)
    before = retrieval_metrics(q, qi, None, g, gi, None, protocol="plain").mAP
    assert metrics_from_distances(final, qi, None, gi, None, "plain").mAP > before + 0.05
    expanded = expand_queries(q, g)
    assert retrieval_metrics(expanded, qi, None, g, gi, None, protocol="plain").mAP > before + 0.03


def test_one_query_and_one_gallery_image_by_hand():
    # d = 0 to oneself and, being the largest, 1 to the other: features (1, e) / (1 + e) and (e, 1) / (1 + e), e = exp(-1)
    q, g = np.array([[3.0, 4.0]]), np.array([[0.0, 0.0]])
    e = math.exp(-1)
    smaller = 2 * e / (1 + e)
    assert rerank(q, g, k2=1, lam=0.25) == pytest.approx(0.75 * (1 - smaller / (2 - smaller)) + 0.25, abs=1e-6)
    # With expansion both features become the mean of both, and nothing is left to tell them apart.
    assert rerank(q, g, lam=0.25) == pytest.approx(0.25, abs=1e-6)
    assert rerank(g, g) == pytest.approx(0, abs=1e-6)


def test_a_query_joins_its_reciprocal_neighbours_by_hand():
    # On a line: 0 (query), 1, 10. k1 = 1: N = {p, nearest}: N(q) = {q, a}, N(a) = {a, q}, N(b) = {b, a}.
    # R(q) = {q, a}, R(a) = {a, q}, R(b) = {b}; round(1 / 2) = 0, so every R(., k1 / 2) is the image alone.
    q, g = np.array([[0.0]]), np.array([[1.0], [10.0]])
    u, v = math.exp(-1 / 100), math.exp(-1 / 81)  # q's and a's weight for each other, before division
    smaller = min(1 / (1 + u), v / (1 + v)) + min(u / (1 + u), 1 / (1 + v))
    expected = [[0.7 * (1 - smaller / (2 - smaller)) + 0.3 / 100, 0.7 + 0.3]]
    np.testing.assert_allclose(rerank(q, g, k1=1, k2=1), expected, atol=1e-6)


def test_the_expansion_takes_more_than_two_thirds_and_half_rounds_to_even():
    """Cases where "at least" 2/3, or round((k1 + 1) / 2) as in the authors' MATLAB, would give something else."""
    told_apart = {"share": False, "half": False}
    for seed in range(60):
        q, g = features(seed, "gauss", 2, 14, 2)
        for k1 in (3, 6, 7):
            final = rerank(q, g, k1, 1, 0)
            np.testing.assert_allclose(final, reference.rerank(q.tolist(), g.tolist(), k1, 1, 0), atol=2e-6)
            loose = reference.rerank(q.tolist(), g.tolist(), k1, 1, 0, enough=lambda shared, size: 3 * shared >= 2 * size)
            told_apart["share"] |= bool(abs(final - loose).max() > 1e-3)
            matlab = reference.rerank(q.tolist(), g.tolist(), k1, 1, 0, half=int((k1 + 1) / 2 + 0.5) - 1)
            told_apart["half"] |= bool(abs(final - matlab).max() > 1e-3)
            assert k1 % 2 or np.allclose(final, matlab, atol=2e-6)  # for an even k1 both are one rule
    assert told_apart == {"share": True, "half": True}


def test_an_image_crowded_out_by_its_duplicates_is_far_from_all():
    # k1 = 1: of four equal images only the first two are anybody's neighbours; the last has an empty set.
    final = rerank(np.zeros((2, 1)), np.array([[0.0], [0.0], [5.0]]), k1=1, k2=1, lam=0)
    np.testing.assert_allclose(final, [[1, 1, 1], [1, 1, 1]])
    np.testing.assert_allclose(final, reference.rerank([[0], [0]], [[0], [0], [5]], 1, 1, 0))


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_near_ties_are_decided_by_the_features_as_given(offset):
    """Distances that differ in the 9th digit: float32 products cannot order them, float64 differences can."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((60, 16))
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * (1 + 1e-9 * rng.standard_normal((60, 1)))
    q, g = np.vstack([np.zeros((1, 16)), x[:3]]) + offset, x[3:] + offset
    np.testing.assert_allclose(rerank(q, g, 5, 3), reference.rerank(q.tolist(), g.tolist(), 5, 3, 0.3), atol=2e-6)
    nearest = module._nearest(module._Images.of(q, g, "euclidean"), range(1), range(1, 61), (7,), 4)
    true = ((q[0] - np.vstack([q[1:], g])) ** 2).sum(1)
    assert set(nearest.places[0]) == set(np.argsort(true)[:7])
    assert nearest.farthest[0] > 0


def test_neighbours_are_the_exact_ones_at_every_cut_with_many_ties():
    x = np.random.default_rng(3).integers(0, 2, (90, 6)).astype(float)
    distances = ((x[:, None] - x[None]) ** 2).sum(2)
    found = module._nearest(module._Images.of(x[:9], x[9:], "euclidean"), range(90), range(90), (21, 11, 6), 7)
    for row, places in zip(distances, found.places):
        expected = sorted(range(90), key=lambda j: (row[j], j))
        for cut in (21, 11, 6):
            assert set(places[:cut]) == set(expected[:cut])


def test_scale_and_offset_of_the_features_change_nothing():
    q, _, g, _ = people(1)
    final = rerank(q, g)
    for changed in (lambda x: x * 1e30, lambda x: x.astype(float) * 1e-100, lambda x: x.astype(float) + 1e4):
        np.testing.assert_allclose(rerank(changed(q), changed(g)), final, atol=2e-6)
    lengths = np.random.default_rng(0).uniform(0.1, 9, (len(g), 1))
    np.testing.assert_allclose(rerank(q.astype(float), g * lengths, metric="cosine"), final, atol=2e-6)
    np.testing.assert_allclose(rerank(torch.from_numpy(q), torch.from_numpy(g)), final, atol=0)


def test_distances_equal_to_12_digits_are_ties():
    q, g = np.array([[0.0]]), np.array([[2e-7], [1e-7], [1.0]])  # divided by the largest: 4e-14, 1e-14, 1
    nearest = module._nearest(module._Images.of(q, g, "euclidean"), range(1), range(4), (2,), 1)
    assert nearest.places.tolist() == [[0, 1]]
    np.testing.assert_allclose(rerank(q, g, 1, 1), reference.rerank(q, g, 1, 1, 0.3), atol=2e-6)


def test_equal_features_everywhere_are_not_compared_one_by_one(monkeypatch):
    monkeypatch.delattr(module._Images, "exact")
    q, g = np.full((3, 4), 0.1), np.full((2000, 4), 0.1)
    assert not rerank(q, g, lam=1).any()
    nearest = module._nearest(module._Images.of(q, g, "euclidean"), range(3), range(3, 2003), (5,), 2)
    assert nearest.places.tolist() == [[0, 1, 2, 3, 4]] * 3 and not nearest.farthest.any()


def test_hubs_take_no_more_memory_than_was_given():
    """Equal images share all their neighbours: 40 x 21 x 1000 pairs at once would take some 40 MB."""
    tracemalloc.start()
    try:
        for _ in reranked_blocks(np.ones((40, 2), np.float32), np.ones((1000, 2), np.float32), memory=1 << 20):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_blocks_come_in_order_are_the_callers_own_and_fit_the_memory():
    q, _, g, _ = people(2, queries=40)
    whole = rerank(q, g)
    memory = 8 * 120 * 16  # 16 rows of 120 images
    starts, parts = [], []
    for start, block in reranked_blocks(q, g, memory=memory):
        assert block.shape[1] == 80 and block.dtype == np.float32
        starts.append(start)
        parts.append(block.copy())
        block[:] = np.inf  # as metrics do with junk: no harm to the next
    assert starts == [0, 16, 32] and [len(part) for part in parts] == [16, 16, 8]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_features_are_left_as_they_were():
    q, _, g, _ = people(3)
    kept = q.copy(), g.copy()
    rerank(q, g, metric="cosine")
    expand_queries(q, g)
    assert np.array_equal(q, kept[0]) and np.array_equal(g, kept[1])


def test_expansion_by_hand():
    q, g = np.array([[2.0, 0.0]]), np.array([[0.0, 5.0], [3.0, 3.0], [-1.0, 0.0]])
    half = math.sqrt(0.5)
    plain = np.array([[1 + half, half]])  # the query and its nearest, each of length 1
    np.testing.assert_allclose(expand_queries(q, g, k=1, alpha=0), plain / np.linalg.norm(plain), atol=1e-6)
    weighted = np.array([[1 + half**3 * half, half**3 * half]])
    np.testing.assert_allclose(expand_queries(q, g, k=1, alpha=3), weighted / np.linalg.norm(weighted), atol=1e-6)
    # The one at a right angle weighs nothing, nor does the opposite one, unless all weigh the same.
    np.testing.assert_allclose(expand_queries(q, g, k=9, alpha=3), weighted / np.linalg.norm(weighted), atol=1e-6)
    everything = np.array([[1 + half - 1, half + 1]])
    np.testing.assert_allclose(expand_queries(q, g, k=9, alpha=0), everything / np.linalg.norm(everything), atol=1e-6)


FEATURES = "; the network diverged or was fed such images: extract them again from a good checkpoint"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, "k1 must be a whole number of neighbours, 1 or more, got 0"),
        ({"k2": -1}, "k2 must be a whole number of neighbours, 1 or more, got -1"),
        ({"k1": 2.5}, "k1 must be a whole number of neighbours, 1 or more, got 2.5"),
        ({"lam": 1.5}, "lambda must lie in [0, 1] (0: Jaccard distance alone, 1: original distance alone), got 1.5; the "
         "paper has 0.3"),
        ({"lam": math.nan}, "lambda must lie in [0, 1] (0: Jaccard distance alone, 1: original distance alone), got nan; "
         "the paper has 0.3"),
        ({"metric": "cosin"}, "unknown metric 'cosin'; did you mean 'cosine'? known: cosine, euclidean"),
        ({"gallery_features": np.eye(3)}, "query features have 2 dimensions and gallery features 3; both must come from "
         "the same network"),
        ({"query_features": np.zeros(2)}, "query features must be N x D with at least one row, got shape (2,); store one "
         "row per image"),
        ({"gallery_features": np.zeros((0, 2))}, "gallery features must be N x D with at least one row, got shape (0, 2); "
         "store one row per image"),
        ({"query_features": np.array([["a", "b"]])}, "query features must be numbers (N x D floats), got dtype <U1"),
        ({"query_features": np.full((2, 2), np.nan)}, "query features hold NaN or infinite numbers" + FEATURES),
        ({"gallery_features": np.full((2, 2), np.inf)}, "gallery features hold NaN or infinite numbers" + FEATURES),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(change, message):
    with pytest.raises(UserError) as error:
        reranked_blocks(**{"query_features": np.eye(2), "gallery_features": np.eye(2), **change})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be a whole number of neighbours, 1 or more, got 0"),
        ({"alpha": -1}, "alpha must be 0 (plain mean) or above, got -1; Radenovic et al. have 3"),
        ({"alpha": math.inf}, "alpha must be 0 (plain mean) or above, got inf; Radenovic et al. have 3"),
        ({"gallery_features": np.eye(3)}, "query features have 2 dimensions and gallery features 3; both must come from "
         "the same network"),
    ],
)
def test_mistakes_in_expansion_are_named(change, message):
    with pytest.raises(UserError) as error:
        expand_queries(**{"query_features": np.eye(2), "gallery_features": np.eye(2), **change})
    assert str(error.value) == message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_cuda():
    for kind in KINDS:
        q, g = features(4, kind, 30, 400, 6)
        on_cuda = rerank(torch.tensor(q).cuda(), torch.tensor(g).cuda(), memory=1 << 17)
        np.testing.assert_allclose(on_cuda, rerank(q, g), atol=2e-6)
        expanded = expand_queries(torch.tensor(q).cuda(), torch.tensor(g).cuda())
        np.testing.assert_allclose(expanded, expand_queries(q, g), atol=2e-6)

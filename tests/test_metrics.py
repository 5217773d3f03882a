"""Retrieval metrics: by hand, against the slow twin, under the protocols, and what they say to a mistake."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreid.errors import UserError
from autoreid.metrics import PROTOCOLS, Protocol, metrics_from_distances, retrieval_metrics, score


def slow(distances, qi, qc, gi, gc, protocol="market1501"):
    rule = PROTOCOLS[protocol]
    rankings = reference.ranked_matches(
        np.asarray(distances).tolist(), qi, qc, gi, gc, rule.drop_identities, rule.remove_same_camera
    )
    return reference.retrieval_metrics(rankings)


def assert_same(metrics, expected):
    flat = lambda d: {**{k: v for k, v in d.items() if k != "cmc"}, **{f"cmc{k}": v for k, v in d["cmc"].items()}}  # noqa: E731
    assert flat(metrics.to_dict()) == pytest.approx(flat(expected), abs=1e-12)


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
    metrics = metrics_from_distances(DISTANCES.copy(), QUERY_IDS, QUERY_CAMS, GALLERY_IDS, GALLERY_CAMS)
    assert metrics.mAP == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 3 + (1 + 2 / 3) / 2) / 3)
    trapezoid = [((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2, (0 + 1 / 3) / 2, (1 + (1 / 2 + 2 / 3) / 2) / 2]
    assert metrics.mAP_trapezoid == pytest.approx(sum(trapezoid) / 3)
    assert metrics.mINP == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
    assert metrics.cmc == pytest.approx({1: 1 / 3, 5: 1.0, 10: 1.0})
    assert (metrics.total, metrics.scored) == (3, 3)
    assert_same(metrics, slow(DISTANCES, QUERY_IDS, QUERY_CAMS, GALLERY_IDS, GALLERY_CAMS))


def test_one_match_at_rank_two_is_a_half_by_step_and_a_quarter_by_trapezoid():
    metrics = metrics_from_distances(np.array([[1.0, 2.0]]), [1], [1], [2, 1], [2, 2])
    assert (metrics.mAP, metrics.mAP_trapezoid) == (0.5, 0.25)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    gallery=st.integers(1, 30),
    levels=st.integers(1, 4),
    protocol=st.sampled_from(["market1501", "veri", "plain"]),
    block=st.sampled_from([1, 4, 256]),
)
def test_equal_to_the_twin_with_ties_junk_distractors_and_unmatched_queries(
    seed, queries, gallery, levels, protocol, block
):
    rng = np.random.default_rng(seed)
    # Small whole numbers: distances are exact in float32, and ties abound.
    q, g = rng.integers(0, levels, (queries, 2)), rng.integers(0, levels, (gallery, 2))
    qi, gi = rng.integers(-1, 5, queries), rng.integers(-1, 4, gallery)
    qc, gc = rng.integers(0, 3, queries), rng.integers(0, 3, gallery)
    distances = ((q[:, None] - g[None]) ** 2).sum(2)
    expected = slow(distances, qi.tolist(), qc.tolist(), gi.tolist(), gc.tolist(), protocol)
    arguments = (q.astype(np.float32), qi, qc, g.astype(np.float32), gi, gc)
    if expected is None:
        with pytest.raises(UserError, match="nothing can be scored"):
            retrieval_metrics(*arguments, protocol=protocol, block=block)
    else:
        assert_same(retrieval_metrics(*arguments, protocol=protocol, block=block), expected)
        assert_same(metrics_from_distances(distances.astype(float), qi, qc, gi, gc, protocol), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("noise", [0.3, 3.0, 100.0])
def test_equal_to_the_twin_on_random_embeddings(metric, noise):
    rng = np.random.default_rng(7)
    centres = rng.standard_normal((12, 16))
    qi, gi = rng.integers(0, 12, 40), np.append(rng.integers(0, 10, 300), np.full(30, -1))
    qc, gc = rng.integers(0, 4, 40), rng.integers(0, 4, 330)
    q, g = (np.float32(centres[i] + noise * rng.standard_normal((len(i), 16))) for i in (qi, gi))
    a, b = q.astype(np.float64), g.astype(np.float64)
    if metric == "cosine":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    distances = ((a[:, None] - b[None]) ** 2).sum(2)
    expected = slow(distances, qi.tolist(), qc.tolist(), gi.tolist(), gc.tolist())
    assert expected["scored"] < expected["total"] == 40  # identities 10 and 11 are in no gallery image
    assert_same(retrieval_metrics(q, qi, qc, g, gi, gc, metric=metric, block=16), expected)
    tensors = [torch.from_numpy(np.asarray(x)) for x in (q, qi, qc, g, gi, gc)]
    assert_same(retrieval_metrics(*tensors, metric=metric), expected)


def test_distractors_lower_the_rank_and_junk_does_not():
    q, g = np.zeros((1, 1)), np.array([[1.0], [2.0], [3.0]])
    with_distractor = retrieval_metrics(q, [1], [1], g, [0, 0, 1], [2, 2, 2])
    with_junk = retrieval_metrics(q, [1], [1], g, [-1, -1, 1], [2, 2, 2])
    assert (with_distractor.mAP, with_junk.mAP) == (1 / 3, 1.0)


def test_features_are_left_as_they_were():
    q, g = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    kept = q.copy(), g.copy()
    retrieval_metrics(q, [1] * 5, [1] * 5, g, [1, 1, -1, 2, 1], [1, 2, 3, 4, 5], metric="cosine")
    assert np.array_equal(q, kept[0]) and np.array_equal(g, kept[1])


def test_plain_needs_no_cameras_and_a_protocol_may_be_ones_own():
    q, g = np.zeros((1, 1)), np.array([[1.0], [2.0]])
    assert retrieval_metrics(q, [1], None, g, [7, 1], None, protocol="plain").mAP == 0.5
    mine = Protocol("mine", drop_identities=(7,), remove_same_camera=False)
    assert retrieval_metrics(q, [1], None, g, [7, 1], None, protocol=mine).mAP == 1.0


def test_equal_cameras_name_the_usual_cause():
    message = (
        "none of the 2 queries has a gallery image of its identity from another camera, so nothing can be scored; "
        "usually all cameras are equal: give the true cameras, or use --protocol plain to ignore them"
    )
    with pytest.raises(UserError) as error:
        retrieval_metrics(np.eye(2), [1, 2], [0, 0], np.eye(2), [1, 2], [0, 0])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cosin"}, "unknown metric 'cosin'; did you mean 'cosine'? known: cosine, euclidean"),
        ({"protocol": "market"}, "unknown protocol 'market'; did you mean 'market1501'? known: market1501, plain, "
         "veri"),
        ({"g": np.eye(3)}, "query features have 2 dimensions and gallery features 3; both must come from the same "
         "network"),
        ({"q": np.zeros(2)}, "query features must be N x D with at least one row, got shape (2,); store one row per "
         "image"),
        ({"q": np.array([["a", "b"]] * 2)}, "query features must be numbers (N x D floats), got dtype <U1"),
        ({"q": np.full((2, 2), np.nan)}, "query features hold NaN or infinite numbers; the network diverged or was fed "
         "such images: extract them again from a good checkpoint"),
        ({"g": np.full((2, 2), np.inf)}, "gallery features hold NaN or infinite numbers; the network diverged or was "
         "fed such images: extract them again from a good checkpoint"),
        ({"gi": [1]}, "gallery identities must be 2 integers, one per feature row, got shape (1,) of int64"),
        ({"qc": [0.5, 1.5]}, "query cameras must be 2 integers, one per feature row, got shape (2,) of float64"),
        ({"gc": None}, "protocol 'market1501' needs cameras; give them, or use --protocol plain"),
    ],
)
def test_mistakes_are_named(change, message):
    given_ = {"q": np.eye(2), "qi": [1, 2], "qc": [0, 0], "g": np.eye(2), "gi": [1, 2], "gc": [1, 1], **change}
    options = {name: given_.pop(name) for name in ("metric", "protocol") if name in given_}
    with pytest.raises(UserError) as error:
        retrieval_metrics(*given_.values(), **options)
    assert str(error.value) == message


def test_score_reads_two_files(tmp_path):
    rng = np.random.default_rng(1)
    arrays = []
    for name, count in (("q", 6), ("g", 20)):
        parts = rng.standard_normal((count, 4)), rng.integers(0, 3, count), rng.integers(0, 3, count)
        np.savez(tmp_path / f"{name}.npz", features=parts[0], identities=parts[1], cameras=parts[2])
        np.savez(tmp_path / f"{name}-plain.npz", features=parts[0], identities=parts[1])
        arrays += parts
    assert score(tmp_path / "q.npz", tmp_path / "g.npz") == retrieval_metrics(*arrays)
    plain = score(tmp_path / "q-plain.npz", tmp_path / "g-plain.npz", protocol="plain", metric="cosine")
    assert plain == retrieval_metrics(*arrays, protocol="plain", metric="cosine")
    with pytest.raises(UserError) as error:
        score(tmp_path / "q-plain.npz", tmp_path / "g.npz")
    assert str(error.value) == (
        f"{tmp_path / 'q-plain.npz'} has no array 'cameras' (it holds features, identities); "
        "store it, or use --protocol plain to ignore cameras"
    )


def test_score_names_files_it_cannot_use(tmp_path):
    wanted = "give an .npz with features (N x D), identities (N) and cameras (N), as numpy.savez writes"
    with pytest.raises(UserError) as error:
        score(tmp_path / "none.npz", tmp_path / "none.npz")
    assert str(error.value) == f"no file {tmp_path / 'none.npz'}; {wanted}"
    text, single, objects, empty = (tmp_path / n for n in ("text.npz", "one.npy", "objects.npz", "empty.npz"))
    text.write_text("hello")
    np.save(single, np.eye(2))
    np.savez(objects, features=np.array([{}], dtype=object))
    empty.touch()
    for path in (text, single, objects, empty):
        with pytest.raises(UserError) as error:
            score(path, path)
        assert str(error.value) == f"{path} cannot be read as arrays of numbers; {wanted}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_cuda():
    rng = np.random.default_rng(3)
    q, g = rng.integers(0, 9, (50, 8)).astype(np.float32), rng.integers(0, 9, (700, 8)).astype(np.float32)
    tags = [rng.integers(-1, 9, n) for n in (50, 50, 700, 700)]
    qi, qc, gi, gc = tags
    on_cuda = retrieval_metrics(torch.tensor(q).cuda(), qi, qc, torch.tensor(g).cuda(), gi, gc, block=16)
    assert on_cuda == retrieval_metrics(q, qi, qc, g, gi, gc)

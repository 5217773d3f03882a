"""The nearest vectors against slow twins: exact in float and in integers, faiss beside them, and what is measured."""

import sys

import numpy as np
import pytest
import reference_neighbours as slow
import torch

from autoreid import neighbours
from autoreid.errors import UserError
from autoreid.neighbours import (
    ENGINES,
    FloatGallery,
    Int8Gallery,
    dequantise,
    integer_product,
    measure_search,
    nearest,
    product_in_floats,
    product_in_integers,
    quantise,
    scale_of,
)


def vectors(count, dims, seed=0, offset=0.0):
    return np.random.default_rng(seed).standard_normal((count, dims), dtype=np.float32) + np.float32(offset)


def codes(count, dims, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-127, 128, (count, dims), dtype=np.int8))


def assert_exact(query, gallery, k):
    distances, indices = nearest(query, gallery, k)
    wanted = slow.nearest(np.asarray(query), np.asarray(gallery), k)
    assert indices.tolist() == [[place for _, place in row] for row in wanted]
    np.testing.assert_allclose(distances, [[float(d) ** 0.5 for d, _ in row] for row in wanted], rtol=2e-7)
    assert distances.dtype == np.float32 and indices.dtype == np.int64


# ---------------------------------------------------------------------------------------- float
@pytest.mark.parametrize("queries, count, k", [(1, 40, 5), (6, 40, 5), (3, 7, 7), (2, 3, 10), (1, 1, 1)])
def test_nearest_is_the_sort_of_all_distances(queries, count, k):
    assert_exact(vectors(queries, 9), vectors(count, 9, 1), k)


def test_in_many_pieces_and_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    monkeypatch.setattr(neighbours, "QUERIES", 4)
    query, gallery = vectors(7, 5), vectors(3000, 5, 1)
    gallery[2500:] = gallery[:500]  # ties across pieces: the first of the two comes first
    distances, indices = nearest(query, gallery, 6)
    exact = np.square(query[:, None].astype(float) - gallery[None]).sum(2)
    assert (indices == np.argsort(exact, axis=1, kind="stable")[:, :6]).all()
    assert (indices[:, 1::2] >= 0).all() and any(b == a + 2500 for row in indices for a, b in zip(row, row[1:]))
    alone = [nearest(query[i : i + 1], gallery, 6) for i in range(7)]
    assert (np.concatenate([found for _, found in alone]) == indices).all()
    assert (np.concatenate([found for found, _ in alone]) == distances).all()


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_what_single_precision_cannot_tell_apart_is_measured_again(offset):
    """A gallery on a tiny cloud: float32 products would order it by their rounding."""
    centre = vectors(1, 16, 5, offset)
    gallery = centre + np.float32(1e-5 if not offset else 1e-3) * vectors(60, 16, 6)
    query = centre + np.float32(2.0) * vectors(4, 16, 7)
    assert_exact(query, gallery, 8)
    rounded = (torch.from_numpy(query) @ torch.from_numpy(gallery).T).mul(-2).add(torch.from_numpy(gallery).square().sum(1))
    truth = [[place for _, place in row] for row in slow.nearest(query, gallery, 8)]
    assert rounded.argsort(dim=1)[:, :8].tolist() != truth  # the test can fail


def test_the_room_for_rounding_is_needed_and_enough(monkeypatch):
    """Far from so dense a cloud the k smallest rounded values are not the k nearest."""
    centre = vectors(1, 16, 5)
    gallery, query = centre + np.float32(1e-6) * vectors(900, 16, 6), centre + np.float32(2.0) * vectors(4, 16, 7)
    assert_exact(query, gallery, 8)
    truth, right = nearest(query, gallery, 8)[1], neighbours._k_nearest
    assert (nearest(query[:1], gallery, 8)[1] == truth[:1]).all()  # by another product
    monkeypatch.setattr(neighbours, "_k_nearest",
                        lambda *args: right(*args[:4], lambda limit: np.zeros_like(limit), args[5]))
    assert (nearest(query, gallery, 8)[1] != truth).any()  # the test can fail


def test_equal_vectors_rank_by_gallery_order_and_the_pool_is_bounded(monkeypatch):
    monkeypatch.setattr(neighbours, "POOL", 50)
    gallery = np.repeat(vectors(3, 8), 1000, axis=0)
    _, indices = nearest(gallery[[1500, 0]], gallery, 4)
    assert indices.tolist() == [[1000, 1001, 1002, 1003], [0, 1, 2, 3]]


def test_half_precision_is_kept_and_searched_exactly():
    gallery = torch.from_numpy(vectors(50, 6)).half()
    built = FloatGallery(gallery)
    assert built.bytes == 50 * 6 * 2 + 50 * 4 and FloatGallery(gallery.float()).bytes == 50 * 6 * 4 + 50 * 4
    query = torch.from_numpy(vectors(3, 6, 1))
    assert (built.search(query, 5).indices == nearest(query, gallery.float(), 5)[1]).all()


@pytest.mark.parametrize("query, gallery, k, words", [
    (np.zeros((1, 3)), np.zeros((2, 4)), 1, "3 dims and the gallery 4"),
    (np.zeros((1, 4)), np.zeros((2, 4)), 0, "1 or more"),
    (np.full((1, 4), np.nan), np.zeros((2, 4)), 1, "query features hold NaN"),
    (np.zeros((1, 4)), np.zeros((0, 4)), 1, "gallery features must be N x D"),
])
def test_bad_input_is_one_line(query, gallery, k, words):
    with pytest.raises(UserError, match=words) as fault:
        nearest(query, gallery, k)
    assert "\n" not in str(fault.value)


# ---------------------------------------------------------------------------------------- int8
@pytest.mark.parametrize("dims", [1, 3, 64, 1024, 1025, 2500])
@pytest.mark.parametrize("product", [product_in_floats, product_in_integers, integer_product])
def test_integer_products_are_exact(dims, product):
    extreme = torch.full((3, dims), -128, dtype=torch.int8)
    for a, b in ((codes(5, dims), codes(70, dims, 1)), (extreme, extreme), (-extreme.clamp(min=-127), extreme)):
        assert torch.equal(product(a, b).long(), a.long() @ b.long().T)


def test_float_products_of_more_dims_would_not_be():
    """The bound of 1,024 dims is there for a reason."""
    numbers = torch.full((1, 4096), 127, dtype=torch.int8)
    numbers[0, -1] = 126
    truth = 4095 * 127**2 + 126**2
    assert product_in_floats(numbers, numbers).item() == truth != product_in_floats(numbers, numbers, 4096).item()


@pytest.mark.parametrize("dims", [1, 16, 300])
def test_integer_distances_are_the_twins_and_the_dequantised_ones(dims):
    query, gallery, scale = codes(4, dims), codes(60, dims, 1), 0.0371
    gallery[40:50] = gallery[:10]
    built = Int8Gallery(gallery, scale)
    truth = slow.squared_of_codes(query, gallery)
    assert built.squared(query).tolist() == truth and built.squared(query).dtype is torch.int32
    floats = (query.double()[:, None] - gallery.double()[None]).mul(scale).square().sum(2)
    np.testing.assert_allclose(np.array(truth) * scale**2, floats, rtol=1e-12)
    squared, indices = built.search_codes(query, 60)
    order = [sorted(range(60), key=lambda i: (row[i], i)) for row in truth]
    assert indices.tolist() == order
    assert squared.tolist() == [[row[i] for i in places] for row, places in zip(truth, order)]
    found = built.search(dequantise(query, scale), 5)  # vectors are coded first
    assert found.indices.tolist() == [places[:5] for places in order]
    np.testing.assert_allclose(found.distances, scale * np.sqrt(squared[:, :5]), rtol=1e-6)


def test_integer_distances_need_more_than_32_bits_from_33_026_dims_on():
    high = torch.full((1, 33_026), 127, dtype=torch.int8)
    low = Int8Gallery(torch.full((2, 33_026), -128, dtype=torch.int8), 1.0)
    assert low.squared(high).tolist() == [[33_026 * 255**2] * 2] and low.squared(high).dtype is torch.int64
    assert low.search_codes(high, 2)[0].tolist() == [[33_026 * 255**2] * 2]


def test_integers_in_many_pieces(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    query, gallery = codes(300, 2), codes(5000, 2, 1)  # two dims: ties everywhere
    built = Int8Gallery(gallery, 1.0)
    squared, indices = built.search_codes(query, 7)
    truth = built.squared(query).numpy()
    assert (indices == np.argsort(truth, axis=1, kind="stable")[:, :7]).all()
    assert (squared == np.take_along_axis(truth, indices, 1)).all()


def test_codes_are_rounded_and_clipped():
    x = torch.tensor([[0.0, 0.5, 1.5, -1.5, 126.6, 500.0, -500.0]]) * 0.25
    assert quantise(x, 0.25).tolist() == [[0, 0, 2, -2, 127, 127, -127]]
    features = torch.from_numpy(vectors(20, 8))
    scale = scale_of(features)
    assert quantise(features, scale).abs().max() == 127
    assert (dequantise(quantise(features, scale), scale) - features).abs().max() <= scale / 2 * 1.0001
    assert scale_of(torch.zeros(2, 2)) == 1.0
    built = Int8Gallery.of(features)
    assert built.scale == scale and built.bytes == 20 * 8 + 20 * 4 + 4


@pytest.mark.parametrize("values, scale, words", [
    (torch.zeros(2, 3), 1.0, "int8 with at least one row, got torch.float32"),
    (torch.zeros(0, 3, dtype=torch.int8), 1.0, r"got torch.int8 \(0, 3\)"),
    (torch.zeros(2, 3, dtype=torch.int8), 0.0, "scale of int8 codes is 0.0"),
    (torch.zeros(2, 3, dtype=torch.int8), float("nan"), "scale of int8 codes is nan"),
])
def test_bad_codes_are_one_line(values, scale, words):
    with pytest.raises(UserError, match=words):
        Int8Gallery(values, scale)


# ---------------------------------------------------------------------------------------- faiss
def test_faiss_finds_the_same():
    pytest.importorskip("faiss")
    query, gallery = vectors(20, 12), vectors(400, 12, 1)
    distances, indices = nearest(query, gallery, 5)
    flat = ENGINES["faiss-flat"](gallery).search(query, 5)
    assert (flat.indices == indices).all()
    np.testing.assert_allclose(flat.distances, distances, rtol=1e-4)
    for name, least in (("faiss-hnsw", 0.99), ("faiss-sq8", 0.9), ("int8", 0.9)):
        found = ENGINES[name](gallery).search(query, 5).indices
        assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(found, indices)]) >= least, name


def test_the_bytes_of_faiss_are_those_of_its_file():
    faiss = pytest.importorskip("faiss")
    gallery = vectors(3000, 16)
    for name in ("faiss-flat", "faiss-sq8", "faiss-hnsw"):
        built = ENGINES[name](gallery)
        assert len(built) == 3000 and built.bytes == pytest.approx(len(faiss.serialize_index(built.index)), rel=0.01), name


def test_without_faiss_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'autoreid\[gallery\]'"):
        ENGINES["faiss-flat"](vectors(3, 4))


# ---------------------------------------------------------------------------------------- side by side
def test_what_is_measured():
    query, gallery = vectors(8, 6), vectors(100, 6, 1)

    class Wrong:
        """Half of the right answers."""

        bytes = 7

        def __init__(self, features):
            self.inner = FloatGallery(features)

        def search(self, query, k):
            found = self.inner.search(query, k)
            found.indices[:, k // 2 :] = -1
            return found

    rows = measure_search({"exact": FloatGallery, "wrong": Wrong}, query, gallery, 4)
    assert [row["engine"] for row in rows] == ["exact", "wrong"] and [row["recall"] for row in rows] == [1.0, 0.5]
    assert rows[1]["bytes"] == 7 and all(row["build_seconds"] >= 0 for row in rows)
    assert all(row["ms_per_query"]["1"] > 0 and row["ms_per_query"]["all"] > 0 for row in rows)


def test_the_scale_of_trained_codes_loses_nothing():
    trained = dequantise(codes(80, 24), 0.02)
    rows = measure_search(["int8"], trained[:9], trained, 5, scale=0.02)
    assert rows[0]["recall"] == 1.0 and rows[0]["bytes"] == 80 * 24 + 80 * 4 + 4


def test_another_as_near_is_found_and_a_farther_one_is_not():
    class Last(FloatGallery):
        def search(self, query, k):
            found = super().search(query, len(self))
            return type(found)(found.distances[:, -k:], found.indices[:, -k:])

    query = torch.zeros(1, 2)
    for gallery, recall in (([[0, 1.0], [1, 0], [0, -1]], 1.0), ([[0, 1.0], [1, 0], [0, -1.00001]], 0.5)):
        assert measure_search({"last": Last}, query, torch.tensor(gallery), 2)[0]["recall"] == recall


def test_an_unknown_engine_is_named():
    with pytest.raises(UserError, match="unknown search engine 'hnsw'; known: exact, faiss-flat, faiss-hnsw"):
        measure_search(["hnsw"], vectors(1, 2), vectors(2, 2), 1)

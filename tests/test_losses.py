"""The losses against their twins, at the edges, and in their gradients."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreid.errors import UserError
from autoreid.losses import batch_hard_triplet, pairwise_euclidean, smoothed_cross_entropy


def test_distances_are_euclidean_and_far_from_the_origin_too():
    a, b = torch.randn(7, 5), torch.randn(4, 5)
    torch.testing.assert_close(pairwise_euclidean(a, b), torch.cdist(a, b))
    torch.testing.assert_close(pairwise_euclidean(a + 1000, b + 1000), torch.cdist(a, b), atol=1e-3, rtol=1e-3)


def test_the_gradient_at_distance_zero_is_zero():
    a = torch.ones(3, 4, requires_grad=True)
    pairwise_euclidean(a, a).sum().backward()
    assert torch.equal(a.grad, torch.zeros(3, 4))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    ids=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.3, "soft"]),
)
def test_triplet_equals_its_twin(seed, count, ids, margin):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(ids, (count,), generator=generator)
    expected = reference.batch_hard_triplet(features.tolist(), labels.tolist(), margin)
    assert batch_hard_triplet(features, labels, margin).item() == pytest.approx(expected or 0.0, abs=1e-9)


def test_triplet_by_hand():
    features = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # d_p 1, 1, 2.5, 2.5; d_n 1.5, 0.5, 0.5, 3; margin 0.3: max(0, -.2), .8, 2.3, max(0, -.2)
    assert batch_hard_triplet(features, labels, 0.3).item() == pytest.approx((0 + 0.8 + 2.3 + 0) / 4)


def test_triplet_gradient_is_the_numerical_one():
    features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    for margin in (2.0, "soft"):
        assert torch.autograd.gradcheck(lambda x, m=margin: batch_hard_triplet(x, labels, m), features)
        assert torch.autograd.gradgradcheck(lambda x, m=margin: batch_hard_triplet(x, labels, m), features)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [5]], ids=["no negative", "no positive", "one image"])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_no_complete_anchor_is_zero_with_zero_gradients(labels, margin):
    features = torch.randn(len(labels), 4, requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor(labels), margin)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_identical_images_give_the_margin_and_finite_gradients():
    features = torch.ones(4, 3, requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and torch.isfinite(features.grad).all()


def test_half_precision_and_autocast_compute_in_float32():
    features, labels = torch.randn(8, 16) * 100, torch.arange(8) // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batch_hard_triplet(features, labels), batch_hard_triplet(features.float(), labels))
        assert smoothed_cross_entropy(torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32
    assert batch_hard_triplet(features.bfloat16(), labels).dtype == torch.float32


def test_an_unknown_margin_says_what_is_allowed():
    with pytest.raises(UserError, match=r"^triplet margin 'hard' is not known; give a number such as 0.3, or 'soft'$"):
        batch_hard_triplet(torch.randn(2, 2), torch.tensor([0, 1]), "hard")


def test_smoothed_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_sum = math.log(math.exp(2) + 1 + math.exp(-1))
    expected = 0.7 * (log_sum - 2) + 0.1 * sum(log_sum - z for z in (2, 0, -1))  # 0.7 + 3 x 0.1
    assert smoothed_cross_entropy(logits, torch.tensor([0]), smoothing=0.3).item() == pytest.approx(expected)

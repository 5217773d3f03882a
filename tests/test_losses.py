"""The losses against their twins, at the edges, and in their gradients."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoreid import recipe
from autoreid.errors import UserError
from autoreid.losses import (
    LOSSES,
    CenterLoss,
    batch_hard_triplet,
    batch_soft_triplet,
    pairwise_euclidean,
    smoothed_cross_entropy,
)

TRIPLETS = pytest.mark.parametrize("triplet", LOSSES.values(), ids=LOSSES)


def test_distances_are_euclidean_and_far_from_the_origin_too():
    a, b = torch.randn(7, 5), torch.randn(4, 5)
    torch.testing.assert_close(pairwise_euclidean(a, b), torch.cdist(a, b))
    torch.testing.assert_close(pairwise_euclidean(a + 1000, b + 1000), torch.cdist(a, b), atol=1e-3, rtol=1e-3)


def test_the_gradient_at_distance_zero_is_zero():
    a = torch.ones(3, 4, requires_grad=True)
    pairwise_euclidean(a, a).sum().backward()
    assert torch.equal(a.grad, torch.zeros(3, 4))


def test_the_table_of_losses():
    assert tuple(LOSSES) == recipe.WORDS["triplet"]
    assert dict(LOSSES) == {"batch-hard": batch_hard_triplet, "batch-soft": batch_soft_triplet}


# ---------------------------------------------------------------------------------------- triplets
@TRIPLETS
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    ids=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.3, "soft"]),
)
def test_triplet_equals_its_twin(triplet, seed, count, ids, margin):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(ids, (count,), generator=generator)
    expected = getattr(reference, triplet.__name__)(features.tolist(), labels.tolist(), margin)
    assert triplet(features, labels, margin).item() == pytest.approx(expected or 0.0, abs=1e-9)


def test_batch_hard_by_hand():
    features = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # d_p 1, 1, 2.5, 2.5; d_n 1.5, 0.5, 0.5, 3; margin 0.3: max(0, -.2), .8, 2.3, max(0, -.2)
    assert batch_hard_triplet(features, labels, 0.3).item() == pytest.approx((0 + 0.8 + 2.3 + 0) / 4)


def test_batch_soft_by_hand():
    # The only anchor with both sides is 0 or 1, 1 apart; from 0 the negatives are log 2 and log 4 away, w = 2/3, 1/3.
    features = torch.tensor([[0.0], [-1.0], [math.log(2)], [math.log(4)]])
    labels = torch.tensor([0, 0, 1, 2])
    at_0 = 1 - (2 / 3 * math.log(2) + 1 / 3 * math.log(4))
    at_1 = 1 - (1 + 2 / 3 * math.log(2) + 1 / 3 * math.log(4))  # every negative 1 farther: the same weights
    expected = (math.log1p(math.exp(at_0)) + math.log1p(math.exp(at_1))) / 2
    assert batch_soft_triplet(features, labels).item() == pytest.approx(expected)


def test_batch_soft_lies_within_batch_hard_and_equals_it_where_there_is_no_choice():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(12, 4, generator=generator), torch.arange(12) // 3
    assert batch_soft_triplet(features, labels) < batch_hard_triplet(features, labels, "soft")
    # with one positive and one negative each, the weights are 1
    pair, ids = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1])
    torch.testing.assert_close(batch_soft_triplet(pair, ids, 9.0), batch_hard_triplet(pair, ids, 9.0))


def test_batch_soft_differentiates_the_weights():
    # Identity 0 stands at 0, 0.5 and 3, and the image at 0 moves; the negative has no positive. With the hinge on,
    # the loss is the mean over three anchors of d_p - d_n, whose slopes follow by the formula of the docstring.
    anchor = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    rest = torch.tensor([[0.5], [3.0], [-20.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1])
    batch_soft_triplet(torch.cat([anchor, rest]), labels, 100.0).backward()

    def d_p(distances):
        d = torch.tensor(distances, dtype=torch.float64)
        return (d.softmax(0) * d).sum()

    def slope(distances, k):  # w (1 + d - d_p)
        d = torch.tensor(distances, dtype=torch.float64)
        return d.softmax(0)[k] * (1 + d[k] - d_p(distances))

    assert slope([0.5, 3.0], 0) < 0  # the near positive is let go
    own = -slope([0.5, 3.0], 0) - slope([0.5, 3.0], 1) - 1  # to the right shortens both, and lengthens d_n by 1
    others = -slope([0.5, 2.5], 0) - slope([3.0, 2.5], 0)
    assert anchor.grad.item() == pytest.approx((own + others).item() / 3)


@TRIPLETS
def test_triplet_gradient_is_the_numerical_one(triplet):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    for margin in (2.0, "soft"):
        assert torch.autograd.gradcheck(lambda x, m=margin: triplet(x, labels, m), features)
        assert torch.autograd.gradgradcheck(lambda x, m=margin: triplet(x, labels, m), features)


@TRIPLETS
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [5]], ids=["no negative", "no positive", "one image"])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_no_complete_anchor_is_zero_with_zero_gradients(triplet, labels, margin):
    features = torch.randn(len(labels), 4, requires_grad=True)
    loss = triplet(features, torch.tensor(labels), margin)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(features.grad, torch.zeros_like(features))


@TRIPLETS
def test_an_incomplete_anchor_is_left_out_and_leaves_no_nan(triplet):
    features = torch.tensor([[0.0], [1.0], [1.5]], requires_grad=True)  # 2 has no positive
    loss = triplet(features, torch.tensor([0, 0, 1]), 0.3)
    assert loss.item() == pytest.approx((0.0 + 0.8) / 2)  # 0: 1 - 1.5 + 0.3 below 0; 1: 1 - 0.5 + 0.3
    loss.backward()
    assert features.grad.flatten().tolist() == pytest.approx([-0.5, 1.0, -0.5])  # d_p 1 to 0, d_n 1 to 2, halved


@TRIPLETS
@pytest.mark.parametrize(("margin", "value"), [(0.3, 0.3), ("soft", math.log(2))])
def test_identical_images_give_the_margin_and_finite_gradients(triplet, margin, value):
    features = torch.ones(4, 3, requires_grad=True)
    loss = triplet(features, torch.tensor([0, 0, 1, 1]), margin)
    loss.backward()
    assert loss.item() == pytest.approx(value) and torch.isfinite(features.grad).all()


@TRIPLETS
def test_half_precision_and_autocast_compute_in_float32(triplet):
    features, labels = torch.randn(8, 16) * 100, torch.arange(8) // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = triplet(features, labels)
    assert torch.equal(inside, triplet(features, labels)) and inside.dtype == torch.float32
    half = features.bfloat16()
    assert torch.equal(triplet(half, labels), triplet(half.float(), labels))


@TRIPLETS
def test_far_distances_stay_finite(triplet):
    features = (torch.arange(6.0)[:, None] * 1e4).requires_grad_()  # exp of such a distance is infinite
    loss = triplet(features, torch.tensor([0, 1, 2, 0, 1, 2]), "soft")
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()


@TRIPLETS
def test_an_unknown_margin_says_what_is_allowed(triplet):
    with pytest.raises(UserError, match=r"^triplet margin 'hard' is not known; give a number such as 0.3, or 'soft'$"):
        triplet(torch.randn(2, 2), torch.tensor([0, 1]), "hard")


# ---------------------------------------------------------------------------------------- center loss
def center_loss(identities, dims, weight=1.0):
    torch.manual_seed(0)
    return CenterLoss(identities, dims, weight).double()


@pytest.mark.parametrize("weight", [0.0, 0.0005, 1.0, 3.0])
def test_center_loss_equals_its_twin_and_centers_get_their_own_unscaled_gradient(weight):
    module = center_loss(5, 3, weight)
    features = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 4, 0, 0, 1])  # nobody of 3
    value, deltas = reference.center_loss(features.tolist(), labels.tolist(), module.centers.tolist())
    loss = module(features, labels)
    loss.backward()
    assert loss.item() == pytest.approx(weight * value, rel=1e-12)
    torch.testing.assert_close(features.grad, weight * (features - module.centers[labels]).detach())
    torch.testing.assert_close(module.centers.grad, torch.tensor(deltas, dtype=torch.float64))
    assert module.centers.grad[3].tolist() == [0, 0, 0]


def test_center_loss_by_hand():
    module = CenterLoss(2, 2)
    with torch.no_grad():
        module.centers.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    loss = module(torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
    assert loss.item() == (25 + 5 + 2) / 2  # a sum over the batch, not a mean
    loss.backward()
    torch.testing.assert_close(module.centers.grad, torch.tensor([[-4 / 3, -6 / 3], [1 / 2, -1 / 2]]))


def test_center_loss_gradient_of_the_features_is_the_numerical_one():
    module, labels = center_loss(3, 2, 0.7), torch.tensor([0, 1, 1, 2])
    features = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, labels), features)


@pytest.mark.parametrize("images", [1, 4, 16])
def test_centers_settle_on_their_images_mean_at_rate_a_half(images):
    """The bare gradient of the sum would go round for ever at 4 images and diverge at 16."""
    module = center_loss(1, 3, weight=0.0005)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    features, labels = torch.randn(images, 3, dtype=torch.float64), torch.zeros(images, dtype=torch.long)
    mean, start = features.mean(0), module.centers.detach()[0].clone()
    for step in range(1, 61):
        optimizer.zero_grad()
        module(features, labels).backward()
        optimizer.step()
        if step == 1:
            torch.testing.assert_close(module.centers[0], start + 0.5 * images / (1 + images) * (mean - start))
    torch.testing.assert_close(module.centers[0], mean, atol=1e-6, rtol=0)


def test_center_loss_in_half_precision_and_on_one_identity():
    module, labels = CenterLoss(4, 16), torch.tensor([1, 1, 1])
    features = (torch.randn(3, 16) * 100).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(features, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, module(features.float(), labels))
    loss.backward()
    assert features.grad.dtype == torch.bfloat16 and torch.isfinite(features.grad).all()
    at_center = module.centers.detach()[[1]]
    assert module(at_center, labels[:1]).item() == 0.0


# ---------------------------------------------------------------------------------------- cross entropy
def test_smoothed_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_sum = math.log(math.exp(2) + 1 + math.exp(-1))
    expected = 0.7 * (log_sum - 2) + 0.1 * sum(log_sum - z for z in (2, 0, -1))  # 0.7 + 3 x 0.1
    assert smoothed_cross_entropy(logits, torch.tensor([0]), smoothing=0.3).item() == pytest.approx(expected)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4, None])
def test_smoothed_cross_entropy_equals_its_twin(smoothing, literal):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (6,), generator=generator)
    epsilon = 1 / 5 if smoothing is None else smoothing
    expected = reference.smoothed_cross_entropy(logits.tolist(), labels.tolist(), epsilon, literal)
    assert smoothed_cross_entropy(logits, labels, smoothing, literal).item() == pytest.approx(expected, rel=1e-12)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: smoothed_cross_entropy(x, labels, smoothing, literal), logits)


@pytest.mark.parametrize("classes", [3, 575])
def test_the_literal_target_sums_to_two_minus_two_over_n_and_asks_for_one_half(classes):
    # Equal logits: every log p is -log N, so the loss is log N times the sum of q.
    label, even = torch.tensor([1]), torch.zeros(1, classes, dtype=torch.float64)
    loss = smoothed_cross_entropy(even, label, None, literal=True)
    assert loss.item() == pytest.approx((2 - 2 / classes) * math.log(classes))
    # Probability 1/2 on the label, the rest shared alike: the gradient vanishes there.
    logits = even.clone()
    logits[0, 1] = math.log(classes - 1)
    logits.requires_grad_()
    smoothed_cross_entropy(logits, label, None, literal=True).backward()
    assert logits.detach().softmax(1)[0, 1].item() == pytest.approx(0.5)
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("literal", [False, True])
def test_smoothed_cross_entropy_in_half_precision(literal):
    logits, labels = torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = smoothed_cross_entropy(logits, labels, literal=literal)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, smoothed_cross_entropy(logits.float(), labels, literal=literal))

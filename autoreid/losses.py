"""What the weights and the alphas learn from: cross entropy over identities, the triplet losses and the center loss.

Sources: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), Eq. 5; Quan et
al., "Auto-ReID" (ICCV 2019), Eq. 3 to 5; Szegedy et al., "Rethinking the Inception Architecture" (CVPR 2016), sec. 7;
"Robust-ReID", Eq. 4 and 5, after Ristani and Tomasi, "Features for Multi-Target Multi-Camera Tracking and
Re-Identification" (CVPR 2018); "SAFR", section 3.3 and Eq. 2, after Wen et al., "A Discriminative Feature Learning
Approach for Deep Face Recognition" (ECCV 2016).
All compute in float32 (float64 stays float64) under autocast too: a distance in half precision is a difference of two
large squares and means nothing. All are pure functions but for the center loss, whose centers are learnt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.errors import UserError


def _full(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pairwise_euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, N x D and M x D -> N x M; the gradient at distance zero is zero, not NaN."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = _full(a), _full(b)
        # Distances do not see a common shift, but |a|^2 + |b|^2 - 2ab does: it cancels badly far from the origin.
        origin = b.detach().mean(0)
        a, b = a - origin, b - origin
        squared = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T
        apart = squared > 0
        # The inner where keeps sqrt away from 0, whose infinite slope would turn the outer zero into NaN.
        return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels N -> who is a positive and who a negative of whom, N x N each, and which anchors have both, N."""
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive, negative = same & ~itself, ~same
    return positive, negative, positive.any(1) & negative.any(1)


def _mean_over_anchors(gap: Tensor, complete: Tensor, margin: float | str) -> Tensor:
    """Gaps d_p - d_n, N, to the mean of max(0, margin + gap), or of log(1 + exp(gap)), over the complete anchors."""
    if isinstance(margin, str) and margin != "soft":
        raise UserError(f"triplet margin '{margin}' is not known; give a number such as 0.3, or 'soft'")
    loss = F.softplus(gap) if margin == "soft" else F.relu(float(margin) + gap)
    return torch.where(complete, loss, 0.0).sum() / complete.sum().clamp(min=1)


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | str = 0.3) -> Tensor:
    """Mean over anchors of max(0, margin + d_p - d_n): farthest positive d_p, nearest negative d_n in the batch.

    ``features`` N x D, ``labels`` N; ``margin="soft"`` takes log(1 + exp(d_p - d_n)) instead of the hinge. An anchor
    without a positive or without a negative in the batch is left out; where all are, the loss is 0 with zero
    gradients. Auto-ReID's Eq. 4 prints max(margin, d_p - d_n), whose gradient is zero until d_p exceeds d_n by more
    than the margin; the hinge of Hermans et al. is what is meant.
    """
    distances = pairwise_euclidean(features, features)  # N x N
    positive, negative, complete = _pairs(labels)
    d_p = distances.masked_fill(~positive, -torch.inf).max(1).values
    d_n = distances.masked_fill(~negative, torch.inf).min(1).values
    return _mean_over_anchors(d_p - d_n, complete, margin)


def batch_soft_triplet(features: Tensor, labels: Tensor, margin: float | str = "soft") -> Tensor:
    """As :func:`batch_hard_triplet`, with d_p and d_n weighted means over all positives and all negatives.

    Positives weigh softmax(d), negatives softmax(-d): the hard ones most, yet one outlier does not decide alone
    (Robust-ReID, Eq. 4; with the soft margin Eq. 5). The gradient goes through the weights: Eq. 4 prints them as
    functions of the distances, and Ristani and Tomasi's own code stops no gradient. So d_p's slope along one positive
    is w (1 + d - d_p): a positive nearer than d_p by more than 1 is let go a little, and a negative farther than d_n
    by more than 1 drawn in. With vectors of length one, as in the paper, distances end at 2 and that is rare.
    """
    distances = pairwise_euclidean(features, features)  # N x N
    positive, negative, complete = _pairs(labels)

    def weighted(mask: Tensor, sign: int) -> Tensor:
        # The lowest number, not -inf, whose softmax is NaN for an anchor without any such pair, and so its gradient.
        weights = (sign * distances).masked_fill(~mask, torch.finfo(distances.dtype).min).softmax(1)
        return (weights * distances).masked_fill(~mask, 0.0).sum(1)

    return _mean_over_anchors(weighted(positive, 1) - weighted(negative, -1), complete, margin)


# The metric-learning losses a recipe chooses from: (features, labels, margin) -> scalar.
LOSSES: dict[str, Callable[[Tensor, Tensor, float | str], Tensor]] = {
    "batch-hard": batch_hard_triplet,
    "batch-soft": batch_soft_triplet,
}


class CenterLoss(nn.Module):
    """weight x 1/2 sum_i |x_i - c_(y_i)|^2 over the batch (SAFR, Eq. 2: a sum, not a mean), one center per identity.

    ``forward(features: N x dims, labels: N) -> scalar``, to be added to the other losses as it is. The centers are
    parameters with a rate of their own, ``torch.optim.SGD(center_loss.parameters(), lr=0.5)`` (Wen et al., alpha),
    without momentum or decay; they serve training only.

    The features get the true gradient, weight (x_i - c_(y_i)). A center gets Wen et al.'s Eq. 4, whatever the weight:
    sum over its n images of (c - x_i), divided by 1 + n. Thus nothing is to be scaled back by 1 / weight between the
    backward pass and the step, and weight 0 is allowed. The division is what makes rate 0.5 safe: the bare gradient
    of the sum, n (c - mean), would carry a center with n = 4 images to the far side of their mean, at the same
    distance for ever, and away with n > 4. The centers start at random like those of Luo et al. 2019, whose 1 / weight
    this replaces.
    """

    def __init__(self, identities: int, dims: int, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.centers = nn.Parameter(torch.randn(identities, dims))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features, centers = _full(features), self.centers[labels]  # N x D each
            images = (labels[:, None] == labels[None, :]).sum(1)  # N: n of each row's identity
            loss = 0.5 * (features - centers.detach()).square().sum()
            pull = 0.5 * ((features.detach() - centers).square().sum(1) / (1 + images)).sum()
            return self.weight * loss + (pull - pull.detach())  # the bracket is 0, and all of the centers' gradient


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float | None = 0.1, literal: bool = False
) -> Tensor:
    """Cross entropy, logits N x C and labels N, against 1 - smoothing on the label plus smoothing / C everywhere.

    ``smoothing=None`` takes 1 / C, SAFR's. ``literal=True`` is the formula that SAFR prints, q_i = I(y = i) -
    smoothing x sgn(I(y = i) - 0.5), with its missing minus sign restored: 1 - smoothing on the label and the whole
    smoothing, not its C-th part, on every other identity. At 1 / C this q sums to 2 - 2 / C and is no distribution:
    the loss is least where the label has probability 1/2, for any C. Hence the standard form is the default.
    """
    classes = logits.shape[1]
    smoothing = 1 / classes if smoothing is None else smoothing
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full(logits)
        if not literal:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        target = torch.full_like(logits, smoothing).scatter(1, labels[:, None], 1 - smoothing)  # N x C
        return F.cross_entropy(logits, target)

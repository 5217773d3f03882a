"""What the weights and the alphas learn from: cross entropy over identities and the batch-hard triplet loss.

Sources: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), Eq. 5; Quan et
al., "Auto-ReID" (ICCV 2019), Eq. 3 to 5; Szegedy et al., "Rethinking the Inception Architecture" (CVPR 2016), sec. 7.
All are pure functions, and compute in float32 (float64 stays float64) under autocast too: a distance in half
precision is a difference of two large squares and means nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | str = 0.3) -> Tensor:
    """Mean over anchors of max(0, margin + d_p - d_n): farthest positive d_p, nearest negative d_n in the batch.

    ``features`` N x D, ``labels`` N; ``margin="soft"`` takes log(1 + exp(d_p - d_n)) instead of the hinge. An anchor
    without a positive or without a negative in the batch is left out; where all are, the loss is 0 with zero
    gradients. Auto-ReID's Eq. 4 prints max(margin, d_p - d_n), whose gradient is zero until d_p exceeds d_n by more
    than the margin; the hinge of Hermans et al. is what is meant.
    """
    if isinstance(margin, str) and margin != "soft":
        raise UserError(f"triplet margin '{margin}' is not known; give a number such as 0.3, or 'soft'")
    distances = pairwise_euclidean(features, features)  # N x N
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive, negative = same & ~itself, ~same
    complete = positive.any(1) & negative.any(1)
    d_p = distances.masked_fill(~positive, -torch.inf).max(1).values
    d_n = distances.masked_fill(~negative, torch.inf).min(1).values
    gap = torch.where(complete, d_p - d_n, 0.0)
    loss = F.softplus(gap) if margin == "soft" else F.relu(float(margin) + gap)
    return torch.where(complete, loss, 0.0).sum() / complete.sum().clamp(min=1)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy, logits N x C and labels N, against 1 - smoothing on the label plus smoothing / C everywhere."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(_full(logits), labels, label_smoothing=smoothing)

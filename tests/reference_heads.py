"""The heads, slow and obvious: one picture, one channel and one stage at a time."""

import torch


def gem(x, p, eps=1e-6):
    """(mean x^p_k)^(1/p_k) of each picture and channel; p has one value, or one for each channel."""
    x, p = x.detach(), p.detach()
    out = torch.zeros(x.shape[:2], dtype=x.dtype)
    for b in range(x.shape[0]):
        for k in range(x.shape[1]):
            power = p[k] if len(p) > 1 else p[0]
            values = [max(float(v), eps) ** float(power) for v in x[b, k].flatten()]
            out[b, k] = (sum(values) / len(values)) ** (1 / float(power))
    return out


def fully_connected(x, linear, norm=None):
    """Linear, then batch norm with its running statistics and ReLU where there is one."""
    y = torch.stack([linear.weight @ row + linear.bias for row in x])
    if norm is not None:
        y = (y - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
        y = torch.where(y > 0, y, torch.zeros_like(y))
    return y


def exits(head, maps):
    """DaRe: phi_1 .. phi_S and their weighted sum, from an ExitsHead's own layers (no necks, eval mode)."""
    phis = []
    for stage, x in zip(head.stages, maps, strict=True):
        _, first, norm, _, _, second = stage
        pooled = torch.stack([torch.stack([channel.sum() / channel.numel() for channel in picture]) for picture in x])
        phis.append(fully_connected(fully_connected(pooled, first, norm), second))
    total = torch.zeros_like(phis[0])
    for s, phi in enumerate(phis):
        total = total + head.fusion[s] * phi
    return [*phis, total]


def streams(head, whole, regions):
    """HA-CNN, Robust-ReID: [global | local], each of length one, from a StreamsHead's own layers (eval mode)."""
    g = fully_connected(gem(whole, head.pooling_global.p), *list(head.fc_global)[:2])
    pooled = [gem(regions[:, r], head.pooling_local.p) for r in range(regions.shape[1])]
    local = fully_connected(torch.cat(pooled, dim=1), *list(head.fc_local)[:2])
    return torch.cat([v / v.norm(dim=1, keepdim=True) for v in (g, local)], dim=1)

"""Slow, obvious twin of the shuffle blocks in autoreid/backbones/robust_reid.py: eval mode, one image, by channels."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def pairs(block):
    """A function that hands out the block's (convolution, batch norm) one after the other, in the order of making."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms)
    rest = iter(list(zip(convs, norms)))
    return lambda: next(rest)


def batch_norm(x, norm):
    return torch.stack([
        (x[c] - norm.running_mean[c]) * norm.weight[c] / math.sqrt(norm.running_var[c] + 1e-5) + norm.bias[c]
        for c in range(len(x))
    ])  # fmt: skip


def pointwise(x, pair):
    """1 x 1 convolution as a sum over the input channels, batch norm, ReLU. C x H x W -> C' x H x W."""
    conv, norm = pair
    out = []
    for row, shift in zip(conv.weight[:, :, 0, 0], conv.bias):
        out.append(sum(weight * channel for weight, channel in zip(row, x)) + shift)
    return batch_norm(torch.stack(out), norm).clamp(min=0)


def depthwise(x, pair, stride):
    """Each channel by its own 3 x 3, batch norm, no ReLU."""
    conv, norm = pair
    assert conv.weight.shape == (len(x), 1, 3, 3)
    out = []
    for c in range(len(x)):
        one = F.conv2d(x[c][None, None], conv.weight[c][None], stride=stride, padding=1)[0, 0]
        out.append(one + conv.bias[c])
    return batch_norm(torch.stack(out), norm)


def interleave(first, second):
    """first[0], second[0], first[1], second[1], ..."""
    return torch.stack([channel for both in zip(first, second, strict=True) for channel in both])


def shuffle_a(x, block):
    take, half = pairs(block), len(x) // 2
    return interleave(x[:half], pointwise(depthwise(pointwise(x[half:], take()), take(), 1), take()))


def shuffle_b(x, block, stride=2):
    take = pairs(block)
    short = pointwise(depthwise(x, take(), stride), take())
    long = pointwise(depthwise(pointwise(x, take()), take(), stride), take())
    return interleave(short, long)


def shuffle_stage(x, stage):
    blocks = list(stage)
    x = shuffle_b(x, blocks[0], stride=1)
    for block in blocks[1:-1]:
        x = shuffle_a(x, block)
    return shuffle_b(x, blocks[-1], stride=2)

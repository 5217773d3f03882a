"""Slow, obvious twin of autoreid/backbones/ha_cnn.py in eval mode: one image, one region, one place at a time.

It knows the order in which a block's convolutions and batch norms were made, and their weights, and nothing else.
"""

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


def conv_bn_relu(x, pair, kernel, stride=1):
    """C x H x W -> C' x H' x W'."""
    conv, norm = pair
    assert conv.weight.shape[2:] == (kernel, kernel)
    x = F.conv2d(x[None], conv.weight, conv.bias, stride=stride, padding=(kernel - 1) // 2)[0]
    channels = []
    for c in range(len(x)):
        scale = norm.weight[c] / math.sqrt(norm.running_var[c] + 1e-5)
        channels.append((x[c] - norm.running_mean[c]) * scale + norm.bias[c])
    return torch.stack(channels).clamp(min=0)


def nine_neighbours(x, outside):
    """The map moved by one pixel in each direction: 9 x C x H x W."""
    height, width = x.shape[1:]
    padded = F.pad(x, (1, 1, 1, 1), value=outside)
    return torch.stack([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def inception_a(x, block):
    take, parts = pairs(block), []
    for _ in range(3):
        parts.append(conv_bn_relu(conv_bn_relu(x, take(), 1), take(), 3))
    parts.append(conv_bn_relu(nine_neighbours(x, 0).sum(0) / 9, take(), 1))
    return torch.cat(parts)


def inception_b(x, block, stride=2):
    take = pairs(block)
    one = conv_bn_relu(conv_bn_relu(x, take(), 1), take(), 3, stride)
    two = conv_bn_relu(conv_bn_relu(conv_bn_relu(x, take(), 1), take(), 3), take(), 3, stride)
    pooled = nine_neighbours(x, -math.inf).amax(0)[:, ::stride, ::stride]
    return torch.cat([one, two, conv_bn_relu(pooled, take(), 1)])


def at(x, row, column):
    """Bilinear value of C x H x W at a real position, zero outside."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                total = total + (1 - abs(row - r)) * (1 - abs(column - c)) * x[:, r, c]
    return total


def resize(x, height, width):
    """Bilinear, the corners onto the corners. C x H x W -> C x height x width."""
    rows = [i * (x.shape[1] - 1) / max(height - 1, 1) for i in range(height)]
    columns = [j * (x.shape[2] - 1) / max(width - 1, 1) for j in range(width)]
    return torch.stack([torch.stack([at(x, r, c) for c in columns], dim=1) for r in rows], dim=1)


def soft_attention(x, block):
    take = pairs(block)
    spatial = conv_bn_relu(x.mean(0)[None], take(), 3, 2)
    spatial = conv_bn_relu(resize(spatial, *x.shape[1:]), take(), 1)
    channel = x.mean((1, 2))[:, None, None]
    channel = conv_bn_relu(conv_bn_relu(channel, take(), 1), take(), 1)
    both = torch.stack([spatial[0] * channel[c, 0, 0] for c in range(len(channel))])
    return 1 / (1 + torch.exp(-conv_bn_relu(both, take(), 1)))


def hard_attention(x, block):
    """Four (x, y)."""
    linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
    out = torch.tanh(linear.weight @ x.mean((1, 2)) + linear.bias)
    return [(out[2 * r].item(), out[2 * r + 1].item()) for r in range(4)]


def region(x, centre, height, width):
    """From centre - scale to centre + scale, -1 the map's first pixel and 1 its last. C x H x W -> C x height x width."""
    def positions(middle, scale, samples, pixels):
        for i in range(samples):
            step = -1 + 2 * i / (samples - 1) if samples > 1 else 0
            yield (middle + scale * step + 1) / 2 * (pixels - 1)

    rows = list(positions(centre[1], 0.25, height, x.shape[1]))
    columns = list(positions(centre[0], 1.0, width, x.shape[2]))
    return torch.stack([torch.stack([at(x, r, c) for c in columns], dim=1) for r in rows], dim=1)


def streams(image, net, stage, local, sizes):
    """One image through a three-stage net: the global map and four local maps, with the regions' ``sizes`` given."""
    x = conv_bn_relu(image, pairs(net.stem)(), 3, 2)
    maps = [None] * 4
    for k in range(3):
        y = stage(x, net.layers[k])
        centres = hard_attention(y, net.hard[k])
        for r in range(4):
            cut = region(x, centres[r], *sizes[k])
            blocks = net.local[k]
            maps[r] = local(cut if maps[r] is None else cut + maps[r], blocks[r] if len(blocks) == 4 else blocks[0])
        x = y * soft_attention(y, net.soft[k])
    return x, torch.stack(maps)


def inception_stage(x, stage):
    blocks = list(stage)
    for block in blocks[:-1]:
        x = inception_a(x, block)
    return inception_b(x, blocks[-1])

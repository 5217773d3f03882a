"""ShuffleNetV2+ written out slowly: a function of an image and of the tensors of a state_dict, taken in their order.

Nothing here knows a name or a module of autoreid/backbones/shufflenet_v2_plus.py; convolutions are sums over the kernel's
places, norms and activations their formulas. An Xception block is "x", a shuffle block its kernel.
"""

import torch

ARCHITECTURE = [[3, 3, "x", 5], [5, 5, 3, 3], [7, 3, 7, 5, 5, 3, 7, 3], [7, 5, "x", 7]]
CHANNELS = {"small": [36, 104, 208, 416], "medium": [48, 128, 256, 512], "large": [68, 168, 336, 672]}


class Tensors:
    """The tensors of a state_dict one after the other."""

    def __init__(self, state):
        self.rest = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]

    def take(self):
        return self.rest.pop(0)

    def norm(self, x):
        """Batch norm in eval mode."""
        weight, bias, mean, variance = (self.take()[None, :, None, None] for _ in range(4))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def conv(self, x, stride=1):
        return convolution(self.take(), x, stride)


def convolution(weight, x, stride=1):
    """Zero padded by half a kernel; depthwise where every filter has one channel."""
    kernel, (batch, channels, height, width) = weight.shape[-1], x.shape
    pad = kernel // 2
    padded = torch.zeros(batch, channels, height + 2 * pad, width + 2 * pad, dtype=x.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = x
    rows, columns = -(-height // stride), -(-width // stride)
    total = 0
    for i in range(kernel):
        for j in range(kernel):
            seen = padded[:, :, i::stride, j::stride][:, :, :rows, :columns]
            if weight.shape[1] == 1:
                total = total + weight[:, 0, i, j][None, :, None, None] * seen
            else:
                total = total + torch.einsum("oi,bihw->bohw", weight[:, :, i, j], seen)
    return total


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def hard_sigmoid(x):
    return torch.clamp(x + 3, 0, 6) / 6


def hard_swish(x):
    return x * hard_sigmoid(x)


def squeeze_excite(tensors, x):
    mean = x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    return x * hard_sigmoid(tensors.conv(relu(tensors.norm(tensors.conv(mean)))))


def deal(x):
    """The channel shuffle as a deck of cards: one channel to the left, one to the right."""
    left, right = [], []
    for channel in range(x.shape[1]):
        (left if channel % 2 == 0 else right).append(x[:, channel])
    return torch.stack(left, 1), torch.stack(right, 1)


def block(tensors, x, op, stride, activation, squeeze):
    passed, y = deal(x) if stride == 1 else (x, x)
    if op == "x":
        for _ in range(3):
            y = tensors.norm(tensors.conv(y))
            y = activation(tensors.norm(tensors.conv(y)))
    else:
        y = activation(tensors.norm(tensors.conv(y)))
        y = tensors.norm(tensors.conv(y, stride))
        y = activation(tensors.norm(tensors.conv(y)))
    if squeeze:
        y = squeeze_excite(tensors, y)
    if stride == 2:
        passed = tensors.norm(tensors.conv(passed, stride))
        passed = activation(tensors.norm(tensors.conv(passed)))
    return torch.cat([passed, y], 1)


def shufflenet_v2_plus(state, images, published_tail=False):
    """The four maps."""
    tensors, maps = Tensors(state), []
    x = hard_swish(tensors.norm(tensors.conv(images, 2)))
    for stage, ops in enumerate(ARCHITECTURE):
        for position, op in enumerate(ops):
            x = block(tensors, x, op, 1 if position else 2, hard_swish if stage else relu, stage >= 2)
        maps.append(x)
    x = hard_swish(tensors.norm(tensors.conv(x)))
    if published_tail:
        x = x.mean(dim=(2, 3), keepdim=True)
        x = squeeze_excite(tensors, x)
        x = hard_swish(tensors.conv(x))
    assert not tensors.rest
    return [*maps[:3], x]

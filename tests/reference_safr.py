"""SAFR written out slowly: a function of an image and of the tensors of a state_dict, taken in their order.

Nothing here knows a name or a module of autoreid/backbones/safr.py; convolutions are sums over the kernel's places, one
channel of attention is mixed after the other.
"""

import torch
from reference_shufflenet_v2_plus import ARCHITECTURE, Tensors, block, hard_swish, relu


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def global_attention(tensors, x):
    y = tensors.conv(x)
    return x * sigmoid(tensors.conv(torch.where(y > 0, y, y / 100)))


def dbam(tensors, x, mask):
    """Eq. 1, channel by channel: a local one or a global one ("ste"), or some of both ("soft")."""
    local = relu(global_attention(tensors, x))
    if mask == "soft":
        reduce, expand = (tensors.take()[:, :, 0, 0] for _ in range(2))
        weights = 0
        for pooled in (local.flatten(2).sum(2) / local[0, 0].numel(), local.flatten(2).max(2).values):  # each B x K
            weights = weights + relu(pooled @ reduce.T) @ expand.T
        weights = sigmoid(weights)
    else:
        chosen = [1.0 if logit >= 0 else 0.0 for logit in tensors.take().flatten()]
        weights = torch.tensor(chosen, dtype=x.dtype).repeat(len(x), 1)
    mixed = torch.empty_like(x)
    for image in range(x.shape[0]):
        for channel in range(x.shape[1]):
            weight = weights[image, channel]
            mixed[image, channel] = weight * local[image, channel] + (1 - weight) * x[image, channel]
    return mixed


def max_pool(x):
    """3 x 3, stride 2, one row and column of nothing around."""
    batch, channels, height, width = x.shape
    padded = torch.full((batch, channels, height + 2, width + 2), -torch.inf, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    rows, columns = (height + 1) // 2, (width + 1) // 2
    seen = [padded[:, :, i::2, j::2][:, :, :rows, :columns] for i in range(3) for j in range(3)]
    return torch.stack(seen).max(0).values


def residual(tensors, x, convolutions, stride, project, site, mask):
    """A basic block (two 3 x 3 convolutions) or a bottleneck (three, the second strides); ``site`` of its DBAM, or none."""
    strides = [stride, 1] if convolutions == 2 else [1, stride, 1]
    weights = []  # of the convolutions and norms, then of the projection: the state holds them before the attention's
    for _ in range(convolutions + project):
        weights.append([tensors.take() for _ in range(5)])

    def convolve(number, y, stride):
        part = Tensors({})
        part.rest = list(weights[number])
        return part.norm(part.conv(y, stride))

    y = x
    for number in range(convolutions - 1):
        y = relu(convolve(number, y, strides[number]))
    if site == "mid":
        y = dbam(tensors, y, mask)
    y = convolve(convolutions - 1, y, strides[-1])
    # the projection is 1 x 1: it reads every second place
    y = relu(y + (convolve(convolutions, x[:, :, ::stride, ::stride], 1) if project else x))
    return dbam(tensors, y, mask) if site == "out" else y


def attended(where, stage, position):
    return {"none": False, "first": (stage, position) == (0, 0), "first_of_stage": position == 0, "all": True}[where]


def safr(state, images, convolutions, blocks, with_global, where, site="mid", mask="ste", last_stride=2):
    """The four maps of the ResNet body; ``where`` may be "none"."""
    tensors, maps = Tensors(state), []
    x = tensors.conv(images, 2)
    if with_global:
        x = global_attention(tensors, x)
    x = max_pool(relu(tensors.norm(x)))
    for stage, number in enumerate(blocks):
        for position in range(number):
            stride = [1, 2, 2, last_stride][stage] if position == 0 else 1
            project = position == 0 and (stage > 0 or convolutions == 3)
            here = site if attended(where, stage, position) else None
            x = residual(tensors, x, convolutions, stride, project, here, mask)
        maps.append(x)
    assert not tensors.rest
    return maps


def safr_micro(state, images, with_global=True, with_local=True, mask="ste", xception=True, projection="before"):
    """The four maps."""
    tensors, maps = Tensors(state), []
    x = tensors.conv(images, 2)
    if with_global:
        x = global_attention(tensors, x)
    x = hard_swish(tensors.norm(x))
    for stage, ops in enumerate(ARCHITECTURE):
        for position, op in enumerate(ops):
            x = block(tensors, x, op, 1 if position else 2, hard_swish if stage else relu, stage >= 2)
            if stage == position == 0:
                x = dbam(tensors, x, mask) if with_local else x
                x = block(tensors, x, "x", 1, relu, False) if xception else x
        maps.append(x)
    if projection == "after":
        x = x.mean(dim=(2, 3), keepdim=True)
    x = hard_swish(tensors.norm(tensors.conv(x)))
    assert not tensors.rest
    return [*maps[:3], x]

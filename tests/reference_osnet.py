"""OSNet written out slowly from Table 1 and Equations 1 to 3 of the paper: plain arithmetic on a dict of tensors, eval
mode. A tensor is taken out of the dict when it is used for the last time, so that what is left over was not used."""

import torch


def convolve(x, weight, stride=1, groups=1):
    """Place by place: the sum over a window of the zero-padded map. N x C x H x W -> N x D x H' x W'."""
    out, _, k, _ = weight.shape
    n, channels, height, width = x.shape
    padded = torch.zeros(n, channels, height + 2 * (k // 2), width + 2 * (k // 2), dtype=x.dtype)
    padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width] = x
    rows, columns = (padded.shape[2] - k) // stride + 1, (padded.shape[3] - k) // stride + 1
    y = torch.zeros(n, out, rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            window = padded[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            if groups == 1:
                y[:, :, i, j] = (window[:, None] * weight).sum(dim=(2, 3, 4))
            else:  # every channel its own kernel
                y[:, :, i, j] = (window * weight[:, 0]).sum(dim=(2, 3))
    return y


def pool(x, k, stride, pad, how):
    n, channels, height, width = x.shape
    padded = torch.full((n, channels, height + 2 * pad, width + 2 * pad), -torch.inf, dtype=x.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = x
    rows, columns = (padded.shape[2] - k) // stride + 1, (padded.shape[3] - k) // stride + 1
    places = [
        [how(padded[:, :, i * stride : i * stride + k, j * stride : j * stride + k]) for j in range(columns)]
        for i in range(rows)
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in places], dim=-2)


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def batch_norm(p, name, x):
    mean, var, scale, shift = (
        p.pop(f"{name}.{part}")[:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5) ** 0.5 * scale + shift


def instance_norm(p, name, x):
    """With the statistics of each image's own map."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    return (x - mean) / (var + 1e-5) ** 0.5 * p.pop(f"{name}.weight")[:, None, None] + p.pop(f"{name}.bias")[:, None, None]


def conv_norm(p, name, x, stride=1):
    return batch_norm(p, f"{name}.1", convolve(x, p.pop(f"{name}.0.weight"), stride))


def lite(p, name, x):
    x = convolve(x, p.pop(f"{name}.0.weight"))
    x = convolve(x, p.pop(f"{name}.1.weight"), groups=x.shape[1])
    return relu(batch_norm(p, f"{name}.2", x))


def gate(p, name, x):
    """Eq. 3's G: the mean of every channel, a hidden layer, a weight per channel. Its tensors stay: all streams share."""
    means = x.mean(dim=(2, 3))
    hidden = relu(means @ p[f"{name}.1.weight"][:, :, 0, 0].T + p[f"{name}.1.bias"])
    logits = hidden @ p[f"{name}.3.weight"][:, :, 0, 0].T + p[f"{name}.3.bias"]
    return (1 / (1 + torch.exp(-logits)))[:, :, None, None]


def block(p, name, x, ibn=False):
    y = relu(conv_norm(p, f"{name}.reduce", x))
    residual = 0
    for t in (1, 2, 3, 4):
        stream = y
        for depth in range(t):
            stream = lite(p, f"{name}.streams.{t - 1}.{depth}", stream)
        residual = residual + gate(p, f"{name}.gate", stream) * stream
    for part in ("1.weight", "1.bias", "3.weight", "3.bias"):
        del p[f"{name}.gate.{part}"]
    residual = conv_norm(p, f"{name}.restore", residual)
    if f"{name}.shortcut.0.weight" in p:
        x = conv_norm(p, f"{name}.shortcut", x)
    total = x + residual  # Eq. 1
    return relu(instance_norm(p, f"{name}.norm", total) if ibn else total)


def osnet(state, images, ibn=False):
    """The maps after conv2, conv3, conv4 and conv5, and the names of the tensors that nothing used."""
    p = {name: value.double() for name, value in state.items() if not name.endswith("num_batches_tracked")}
    x = convolve(images.double(), p.pop("stem.0.weight"), stride=2)
    x = relu((instance_norm if ibn else batch_norm)(p, "stem.1", x))
    x = pool(x, 3, 2, 1, lambda window: window.amax(dim=(2, 3)))
    conv2 = block(p, "layers.0.1", block(p, "layers.0.0", x, ibn), ibn)
    x = pool(relu(conv_norm(p, "transitions.1", conv2)), 2, 2, 0, lambda window: window.mean(dim=(2, 3)))
    conv3 = block(p, "layers.1.1", block(p, "layers.1.0", x))
    x = pool(relu(conv_norm(p, "transitions.2", conv3)), 2, 2, 0, lambda window: window.mean(dim=(2, 3)))
    conv4 = block(p, "layers.2.1", block(p, "layers.2.0", x))
    conv5 = relu(conv_norm(p, "layers.3.0", conv4))
    return [conv2, conv3, conv4, conv5], sorted(p)

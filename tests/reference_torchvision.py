"""What the networks made of torchvision's modules are compared with: torchvision's own networks, opened by hooks, and
a vision transformer and a bicubic interpolation written out by hand.
"""

import math
from functools import partial

import torch
from torch import nn


def randomised(net: nn.Module) -> nn.Module:
    """In eval mode, with norms whose every parameter and average matters: freshly made ones are nearly identities."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def outputs(net: nn.Module, names: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What the modules of these names give when the net runs on the images; copied, as the next may work in place."""
    kept = {}

    def keep(name, module, inputs, output):
        kept[name] = output.detach().clone()

    hooks = [net.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return [kept[name] for name in names]


def slow_vit(state: dict, images: torch.Tensor, positions: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """The class token, B x C, after every encoder layer, and at last after the final norm; torchvision's names."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x, name):
        q, k, v = (x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]).chunk(3, dim=-1)
        size = x.shape[-1] // heads
        found = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            found.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[..., part])
        return linear(torch.cat(found, -1), f"{name}.out_proj")

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    kernel = state["conv_proj.weight"].flatten(1)
    tokens = [state["class_token"][0].expand(len(images), -1)]
    for y in range(0, images.shape[2], 16):  # row by row
        for x in range(0, images.shape[3], 16):
            tokens.append(images[:, :, y : y + 16, x : x + 16].flatten(1) @ kernel.T + state["conv_proj.bias"])
    x = torch.stack(tokens, 1) + positions
    found, layer = [], 0
    while f"encoder.layers.encoder_layer_{layer}.ln_1.weight" in state:
        at = f"encoder.layers.encoder_layer_{layer}"
        x = x + attention(norm(x, f"{at}.ln_1"), f"{at}.self_attention")
        x = x + linear(gelu(linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.0")), f"{at}.mlp.3")
        found.append(x[:, 0])
        layer += 1
    return [*found, norm(x, "encoder.ln")[:, 0]]


def slow_bicubic(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """h x w x C to height x width x C: Keys' cubic of a = -0.75, pixel centres at halves, edges repeated."""

    def weight(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    h, w, channels = values.shape
    out = torch.zeros(height, width, channels)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = values[min(max(m, 0), h - 1), min(max(n, 0), w - 1)]
                    out[i, j] += weight(y - m) * weight(x - n) * value
    return out


def resized(positions: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """The positions 1 x (1 + h w) x C of one grid at another, by :func:`slow_bicubic`; the class token's unchanged."""
    patches = slow_bicubic(positions[0, 1:].reshape(*grid, -1), *wanted)
    return torch.cat([positions[:, :1], patches.reshape(1, wanted[0] * wanted[1], -1)], 1)


def dare_to_exit(build, number: int) -> nn.Module:
    """A backbone up to the exit of this number (1 to 4) and that exit's head, with the parameters of all of DaRe: four
    heads Linear(C, 1024), BN, ReLU, Linear(1024, 128) and a weight for each.
    """

    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build()
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(c, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 128))
                for c in self.backbone.stage_channels
            )
            self.weights = nn.Parameter(torch.empty(4))

        def forward(self, images):
            for seen, x in enumerate(self.backbone.stages(images), 1):
                if seen == number:
                    return self.heads[seen - 1](x.mean((2, 3)))

    return Exits()

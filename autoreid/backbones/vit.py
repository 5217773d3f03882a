"""ViT-B/16 (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021), from torchvision's encoder, with the
embedding cut to its first dimensions.

The encoder of the embedding compression study (McDermott, "Embedding compression for efficient
re-identification", section 4: "a standard ViT-Base backbone") is the paper's base model: 12 layers, 768 wide, 12 heads,
MLP of 3072, patches of 16 x 16 without overlap, no dropout. Its "slicing" (section 3) is ``embedding``: from the start
of the training both losses see only the first dimensions of the class token.

The positions are learned for one grid of patches (``grid``: 16 x 8 is a picture of 256 x 128) and interpolated for
another (Dosovitskiy et al., section 3.2, "2D interpolation"): bicubic, corners not aligned, no antialiasing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder

from autoreid.errors import UserError

IMAGENET = {"vit_b16": "ViT_B_16_Weights.IMAGENET1K_V1"}  # torchvision's weights, by our models' names

PATCH = 16
STAGES = 4


class ViT(nn.Module):
    """B x 3 x H x W -> B x embedding x 1 x 1: the class token as a map of one pixel. H and W are multiples of 16."""

    def __init__(self, embedding: int, grid: tuple[int, ...], width: int, depth: int, heads: int) -> None:
        super().__init__()
        if not 1 <= embedding <= width:
            raise UserError(f"vit: embedding={embedding}; allowed: 1 to {width}, the dimensions of the class token")
        if len(grid) != 2 or min(grid) < 1:
            raise UserError(
                f"vit: grid={'x'.join(map(str, grid))}; allowed: two whole numbers from 1, the patches down and across, as "
                "in 16x8 for pictures of 256 x 128"
            )
        self.grid = (grid[0], grid[1])
        # the attributes bear torchvision's names, so that its weights fit
        self.conv_proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(1 + grid[0] * grid[1], depth, heads, width, 4 * width, dropout=0.0, attention_dropout=0.0)
        self.channels = embedding
        self.stage_channels = (*[width] * (STAGES - 1), embedding)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (3 * PATCH**2)))  # the rest: as torchvision's
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The class token after every quarter of the layers, B x width x 1 x 1; the last one normed and cut to
        B x embedding x 1 x 1. A caller that stops reading stops the computation.
        """
        height, width = images.shape[-2:]
        if height % PATCH or width % PATCH:
            raise UserError(
                f"vit: the picture is {height} x {width}; both sides must be multiples of {PATCH}: the nearest size is "
                f"{_nearest(height)} x {_nearest(width)}"
            )
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # B x n x C
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        x = tokens + resize_positions(self.encoder.pos_embedding, self.grid, (height // PATCH, width // PATCH))
        depth = len(self.encoder.layers)
        for number, layer in enumerate(self.encoder.layers, 1):
            x = layer(x)
            if number < depth and number % (depth // STAGES) == 0:
                yield x[:, 0, :, None, None]
        yield self.encoder.ln(x[:, 0])[:, : self.channels, None, None]

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map

    def from_torchvision(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's tensors under our names, without its classifier, the positions interpolated to our grid.

        Its files are older than its modules: they write ``mlp.linear_1`` and ``mlp.linear_2`` for ``mlp.0`` and
        ``mlp.3``. Its pictures are square, so positions in the number of a square are of a square grid.
        """
        ours = {
            name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3."): tensor
            for name, tensor in state.items() if not name.startswith("heads.")
        }
        positions = ours.get("encoder.pos_embedding")
        if positions is not None and positions.dim() == 3:
            side = math.isqrt(positions.shape[1] - 1)
            if side > 0 and 1 + side**2 == positions.shape[1]:
                ours["encoder.pos_embedding"] = resize_positions(positions, (side, side), self.grid)
        return ours


def resize_positions(positions: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """1 x (1 + n) x C, n the patches of ``grid``, to 1 x (1 + m) x C, m those of ``wanted``; the class token's stays."""
    if grid == wanted:
        return positions
    token, patches = positions[:, :1], positions[:, 1:]
    maps = patches.unflatten(1, grid).permute(0, 3, 1, 2)  # 1 x C x h x w
    maps = F.interpolate(maps, wanted, mode="bicubic", align_corners=False)
    return torch.cat([token, maps.flatten(2).transpose(1, 2)], dim=1)


def _nearest(side: int) -> int:
    return max(1, round(side / PATCH)) * PATCH


def vit_b16(embedding: int = 768, grid: tuple[int, ...] = (16, 8)) -> ViT:
    return ViT(embedding, grid, width=768, depth=12, heads=12)

"""Augmentation of a whole batch: every random number first, then crop and mirror, colours and patches on uint8, then
normalise and erase.

Random erasing: Zhong et al. (AAAI 2020) with torchvision's distribution (``RandomErasing``): the box has 2 to 40 % of the
area and height / width log-uniform in 0.3 to 3.3, up to ten attempts until it fits, its place is uniform. The colour is
the mean: 0 after normalisation. Pad and crop: Luo et al. 2019. Larger pictures to crop from: DaRe (Wang et al. 2018).

After the crop, in this order: AutoAugment (Cubuk et al. 2019, the policy for ImageNet) or RandAugment (Cubuk et al. 2020)
with torchvision's 31 magnitudes, black where a picture was moved away; a random patch (Zhou et al., OSNet, ICCV 2019);
colour jitter in random order, with the proportions of SimCLR (Chen et al. 2020): of the strength, 0.8 for brightness,
contrast and saturation each, 0.2 for the hue. Pixels are changed by torchvision's functions.

OSNet's patches come from a pool of the pictures before. Here a patch comes from another picture of the same batch, before
its own augmentation, and so from the batch's name alone. Its distribution is that of the authors' code: 1 to 50 % of the
area, height / width uniform in 0.1 to 10, half of them mirrored and half turned by -10 to 10 degrees.

A picture has one row of random numbers for each kind, a function of (seed, epoch, batch, position) alone: neither another
setting nor the rest of the batch moves them. A crop is copied as a slice per picture: 40 times as fast as a gather.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoreid.errors import UserError, unknown
from autoreid.recipe import MOST_OPERATIONS, WORDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# (x / 255 - mean) / std as one product and one sum; 3 x 1 x 1.
_SCALE = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32).reshape(3, 1, 1)
_SHIFT = (-np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32).reshape(3, 1, 1)

ERASED_AREA, ERASED_RATIO, ATTEMPTS = (0.02, 0.4), (0.3, 3.3), 10
# What the columns of random numbers decide.
FRAME, FLIP, TOP, LEFT, ERASE, BOX_TOP, BOX_LEFT = range(7)
AREAS, RATIOS = slice(7, 7 + ATTEMPTS), slice(7 + ATTEMPTS, 7 + 2 * ATTEMPTS)
COLUMNS = 7 + 2 * ATTEMPTS
# Of a patch; ten areas and ten ratios follow.
PATCHED, DONOR, FROM_TOP, FROM_LEFT, TO_TOP, TO_LEFT, MIRROR, TURN = range(8)
PATCH_AREA, PATCH_RATIO, PATCH_TURN = (0.01, 0.5), (0.1, 10.0), 10
# A stream of random numbers for each kind and how many of it a picture has. What is new gets its own stream: it must not
# move the numbers of the others.
STREAMS = {"crop": (1, COLUMNS), "jitter": (2, 5), "auto": (3, 2 * MOST_OPERATIONS), "patch": (4, 8 + 2 * ATTEMPTS)}

JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
ORDERS = tuple(itertools.permutations(range(4)))
# What the lowest and the highest magnitude mean: tangents, shares of the side, degrees, factors less 1, bits, a share.
RANGES = {
    "shear_x": (0.0, 0.3), "shear_y": (0.0, 0.3), "translate_x": (0.0, 150 / 331), "translate_y": (0.0, 150 / 331),
    "rotate": (0.0, 30.0), "brightness": (0.0, 0.9), "saturation": (0.0, 0.9), "contrast": (0.0, 0.9),
    "sharpness": (0.0, 0.9), "posterize": (8.0, 4.0), "solarize": (1.0, 0.0),
}
SIGNED = tuple(RANGES)[:9]  # they go either way
MAGNITUDES = 30  # RandAugment's go from 0 to 30, AutoAugment's from 0 to 9
# One of AutoAugment's 25 pairs is drawn: (operation, chance, magnitude), Cubuk et al. 2019, table 9.
POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)), (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)), (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)), (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)), (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)), (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("saturation", 0.4, 0)), (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)), (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("saturation", 0.6, 4), ("contrast", 1.0, 8)), (("rotate", 0.8, 8), ("saturation", 1.0, 2)),
    (("saturation", 0.8, 8), ("solarize", 0.8, 7)), (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)), (("saturation", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)), (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)), (("saturation", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
RANDOM = (  # RandAugment's operations
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)


@dataclass(frozen=True)
class Augment:
    """Chance of a mirror image; pixels of black padding before a random crop; chance that a box is erased to the mean.

    ``pad`` counts pixels of the network's input. ``enlarge`` 1.125 reads pictures an eighth larger than the input, from
    which the crop is taken (DaRe). Without either nothing is cropped. ``jitter`` is the colour jitter's strength,
    ``auto_augment`` "none", "autoaugment" or "randaugment" (``rand_n`` operations of magnitude ``rand_m``, 0 to 30) and
    ``patch`` the chance of a random patch.
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    enlarge: float = 1.0
    jitter: float = 0.0
    auto_augment: str = "none"
    rand_n: int = 2
    rand_m: int = 9
    patch: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> Augment:
        """The fields of the same names of a recipe."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})

    def __post_init__(self) -> None:
        for name, what in (("flip", "probability"), ("erase", "probability"), ("jitter", "strength"),
                           ("patch", "probability")):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment {name} is a {what} in [0, 1], got {getattr(self, name)}")
        if self.auto_augment not in WORDS["auto_augment"]:
            raise unknown("auto_augment", self.auto_augment, WORDS["auto_augment"])
        for name, low, high in (("rand_n", 1, MOST_OPERATIONS), ("rand_m", 0, MAGNITUDES)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"augment {name} is a number from {low} to {high}, got {getattr(self, name)}")
        if self.pad < 0:
            raise UserError(f"augment pad is a number of pixels, 0 or more, got {self.pad}")
        if not 1 <= self.enlarge <= 4:
            raise UserError(f"augment enlarge is a factor from 1 to 4, got {self.enlarge}")


USUAL = Augment()


class Plan(NamedTuple):
    """What happens to each of B pictures."""

    flip: np.ndarray  # B bool
    corner: np.ndarray  # B x 2 int64: top and left of the crop in the picture, negative where it begins in the padding
    boxes: np.ndarray  # B x 4 int64: top, left, height, width of what is erased, in the crop; all 0 for nothing


def enlarged(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, in whole pixels."""
    return round(size[0] * factor), round(size[1] * factor)


def random_numbers(seed: int, epoch: int, batch: int, count: int, of: str = "crop") -> np.ndarray:
    """count x columns uniform in [0, 1) for one of the STREAMS, row by row: a row does not depend on how many there are."""
    stream, columns = STREAMS[of]  # from 1: 0 would be the sampler's [seed, epoch], as numpy takes missing words for zeros
    return np.random.default_rng([seed, epoch, batch, stream]).random((count, columns))


def make_plan(augment: Augment, numbers: np.ndarray, picture: tuple[int, int], size: tuple[int, int]) -> Plan:
    """What the random numbers (B x COLUMNS) mean for pictures of size ``picture`` and crops of ``size``, both (H, W)."""
    places = np.array(picture) + 2 * augment.pad - np.array(size) + 1  # of the crop, in height and in width
    corner = (numbers[:, [TOP, LEFT]] * places).astype(np.int64) - augment.pad
    boxes = np.where(numbers[:, [ERASE]] < augment.erase, _boxes(numbers, size), 0)
    return Plan(numbers[:, FLIP] < augment.flip, corner, boxes)


def _boxes(numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """B x 4: the first attempt's box that fits, zeros where none does."""
    height, width = size
    area = height * width * _between(*ERASED_AREA, numbers[:, AREAS])  # B x ATTEMPTS
    ratio = np.exp(_between(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]), numbers[:, RATIOS]))
    h, w, fits = _first_fitting(area, ratio, size)
    top, left = numbers[:, BOX_TOP] * (height - h + 1), numbers[:, BOX_LEFT] * (width - w + 1)
    return np.where(fits[:, None], np.stack([top, left, h, w], 1).astype(np.int64), 0)


def _first_fitting(area: np.ndarray, ratio: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Height and width (B each) of the first of B x ATTEMPTS boxes that is smaller than ``size``, and whether one is."""
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (h < size[0]) & (w < size[1])
    rows, first = np.arange(len(area)), fits.argmax(1)
    return h[rows, first], w[rows, first], fits.any(1)


def _between(low: float, high: float, numbers: np.ndarray) -> np.ndarray:
    return low + (high - low) * numbers


def crop(pictures: Sequence[np.ndarray], plan: Plan, size: tuple[int, int]) -> Tensor:
    """B x 3 x H x W uint8: of each picture (3 x H' x W') its part of ``size``, black outside, mirrored if so planned."""
    height, width = size
    images = np.zeros((len(pictures), 3, height, width), np.uint8)
    for image, picture, flip, (top, left) in zip(images, pictures, plan.flip, plan.corner.tolist(), strict=True):
        if flip:
            image = image[:, :, ::-1]  # a view: what is written to it is mirrored
        inside = picture[:, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
        top, left = max(0, -top), max(0, -left)
        image[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    return torch.from_numpy(images)


# ---------------------------------------------------------------------------------------- patches and colours
class Patch(NamedTuple):
    """One picture's patch from another."""

    position: int  # of the picture that gets it, in this process's part of the batch
    donor: int  # of the picture that it is cut from, in the whole batch
    corner: tuple[int, int]  # its top and left in the donor as it was read
    size: tuple[int, int]  # height, width
    place: tuple[int, int]  # its top and left in the picture
    mirror: bool
    turn: int  # degrees, against the clock


def make_patches(
    chance: float, numbers: np.ndarray, part: slice, picture: tuple[int, int], size: tuple[int, int]
) -> list[Patch]:
    """The patches of the positions ``part``, by the numbers of the whole batch (B x columns of "patch"), for pictures of
    size ``picture`` and crops of ``size``, both (H, W)."""
    count = len(numbers)
    if count < 2:
        return []
    area = math.prod(size) * _between(*PATCH_AREA, numbers[:, 8 : 8 + ATTEMPTS])
    h, w, fits = _first_fitting(area, _between(*PATCH_RATIO, numbers[:, 8 + ATTEMPTS :]), size)
    box = np.maximum(np.stack([h, w], 1), 1)
    donor = (np.arange(count) + 1 + (numbers[:, DONOR] * (count - 1)).astype(np.int64)) % count  # any but itself
    corner = numbers[:, [FROM_TOP, FROM_LEFT]] * (np.array(picture) - box + 1)
    place = numbers[:, [TO_TOP, TO_LEFT]] * (np.array(size) - box + 1)
    turn = np.floor((2 * numbers[:, TURN] - 1) * (2 * PATCH_TURN + 1)) - PATCH_TURN  # of the upper half of the numbers
    rows = np.concatenate([donor[:, None], corner, box, place], 1).astype(np.int64).tolist()
    return [
        Patch(i - part.start, d, (from_top, from_left), (high, wide), (to_top, to_left),
              bool(numbers[i, MIRROR] < 0.5), int(turn[i]) if numbers[i, TURN] >= 0.5 else 0)
        for i, (d, from_top, from_left, high, wide, to_top, to_left) in enumerate(rows[: part.stop])
        if i >= part.start and fits[i] and numbers[i, PATCHED] < chance
    ]


def paste(image: Tensor, donor: np.ndarray, patch: Patch) -> None:
    """Put the patch of a donor (3 x H' x W') on an image (3 x H x W), both uint8, in place."""
    from torchvision.transforms.v2 import functional

    (top, left), (height, width) = patch.corner, patch.size
    piece = torch.from_numpy(donor[:, top : top + height, left : left + width].copy())
    piece = piece.flip(2) if patch.mirror else piece
    piece = functional.rotate(piece, patch.turn) if patch.turn else piece
    top, left = patch.place
    image[:, top : top + height, left : left + width] = piece


# What an operation does with torchvision's functions F to an image x, at a magnitude m in its RANGES.
OPERATIONS: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    "identity": lambda F, x, m: x,
    "shear_x": lambda F, x, m: F.affine(x, 0.0, [0, 0], 1.0, [math.degrees(math.atan(m)), 0.0], center=[0, 0]),
    "shear_y": lambda F, x, m: F.affine(x, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(m))], center=[0, 0]),
    "translate_x": lambda F, x, m: F.affine(x, 0.0, [int(m), 0], 1.0, [0.0, 0.0]),
    "translate_y": lambda F, x, m: F.affine(x, 0.0, [0, int(m)], 1.0, [0.0, 0.0]),
    "rotate": lambda F, x, m: F.rotate(x, m),
    "brightness": lambda F, x, m: F.adjust_brightness(x, 1 + m),
    "saturation": lambda F, x, m: F.adjust_saturation(x, 1 + m),
    "contrast": lambda F, x, m: F.adjust_contrast(x, 1 + m),
    "sharpness": lambda F, x, m: F.adjust_sharpness(x, 1 + m),
    "posterize": lambda F, x, m: F.posterize(x, round(m)),
    "solarize": lambda F, x, m: F.solarize(x, 255 * m),
    "autocontrast": lambda F, x, m: F.autocontrast(x),
    "equalize": lambda F, x, m: F.equalize(x),
    "invert": lambda F, x, m: F.invert(x),
}


def choose_operations(augment: Augment, row: Sequence[float], size: tuple[int, int]) -> list[tuple[str, float]]:
    """AutoAugment's or RandAugment's operations on a picture of ``size`` (H, W) and their magnitudes, by its numbers."""
    if augment.auto_augment == "autoaugment":
        pair = POLICY[int(row[0] * len(POLICY))]
        return [
            (name, _magnitude(name, step, 9, sign, size))
            for (name, chance, step), u, sign in zip(pair, row[1:5:2], row[2:5:2], strict=True) if u < chance
        ]
    drawn = row[: 2 * augment.rand_n]
    names = [RANDOM[int(u * len(RANDOM))] for u in drawn[::2]]
    return [
        (name, _magnitude(name, augment.rand_m, MAGNITUDES, sign, size))
        for name, sign in zip(names, drawn[1::2], strict=True)
    ]


def _magnitude(name: str, step: int, steps: int, sign: float, size: tuple[int, int]) -> float:
    """The ``step``-th of 0 to ``steps`` through the operation's range; in single precision, as torchvision has it."""
    low, high = RANGES.get(name, (0.0, 0.0))
    side = {"translate_y": size[0], "translate_x": size[1]}.get(name, 1)
    magnitude = float(torch.linspace(low, high * side, steps + 1)[step])
    return -magnitude if name in SIGNED and sign < 0.5 else magnitude


def change_colours(images: Tensor, strength: float, numbers: np.ndarray) -> None:
    """Colour jitter of B x 3 x H x W uint8 in place, by B x 5 numbers: four factors and their order."""
    from torchvision.transforms.v2 import functional as F

    adjusts = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for image, (*factors, order) in zip(images, numbers.tolist(), strict=True):
        changed = image
        for n in ORDERS[int(order * len(ORDERS))]:
            usual = 0.0 if n == 3 else 1.0
            changed = adjusts[n](changed, usual + strength * JITTER[n] * (2 * factors[n] - 1))
        image.copy_(changed)


def change(
    images: Tensor,
    augment: Augment,
    drawn: Callable[[str], np.ndarray],
    patches: Sequence[Patch] = (),
    donors: Sequence[np.ndarray] = (),
) -> None:
    """All that happens to crops (B x 3 x H x W uint8) before they are normalised, in place. ``drawn`` gives the crops'
    random numbers of a stream."""
    if augment.auto_augment == "none" and not patches and augment.jitter == 0:
        return
    from torchvision.transforms.v2 import functional

    with _one_thread():
        if augment.auto_augment != "none":
            for image, row in zip(images, drawn("auto").tolist(), strict=True):
                changed = image
                for name, magnitude in choose_operations(augment, row, (images.shape[2], images.shape[3])):
                    changed = OPERATIONS[name](functional, changed, magnitude)
                image.copy_(changed)
        for patch, donor in zip(patches, donors, strict=True):
            paste(images[patch.position], donor, patch)
        if augment.jitter > 0:
            change_colours(images, augment.jitter, drawn("jitter"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker process, where torch has one thread: more would add in another order, and round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------- normalise and erase
def normalise(images: Tensor) -> Tensor:
    """B x 3 x H x W uint8 to float32 with ImageNet's mean and deviation, on the images' device."""
    if images.device.type != "cpu":
        scale, shift = (torch.from_numpy(x).to(images.device) for x in (_SCALE, _SHIFT))
        return images.to(torch.float32).mul_(scale).add_(shift)
    # numpy, and one picture at a time: it stays in the processor's cache, and large results get huge pages.
    out = np.empty(tuple(images.shape), np.float32)
    for result, image in zip(out, images.numpy(), strict=True):
        result[...] = image
        result *= _SCALE
        result += _SHIFT
    return torch.from_numpy(out)


def finish(images: Tensor, boxes: Tensor) -> Tensor:
    """The end of the job, on the images' device: normalise, then erase the boxes (B x 4, on the CPU) to the mean."""
    finished = normalise(images)
    for image, (top, left, height, width) in zip(finished, boxes.tolist(), strict=True):
        if height:
            image[:, top : top + height, left : left + width] = 0
    return finished

"""What drawn people and drawn vehicles share: motifs, camera looks, panoramas, occluders.

The idea: a picture is an identity plus nuisance, and every nuisance hangs on the camera, the tracklet or the frame,
never on the identity. A camera has one look (gain, white balance, gamma, haze, noise, blur, lamp) and one panorama,
so colour and background tell *where* a picture was taken: a shortcut within one camera, which the usual protocol
punishes by ignoring matches from the query's own camera.

All colours are float32 RGB in [0, 1]; images are H x W x 3; angles are radians unless a name says degrees.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PALETTE = {
    "black": (0.07, 0.07, 0.08), "charcoal": (0.24, 0.25, 0.28), "grey": (0.52, 0.53, 0.55),
    "silver": (0.74, 0.75, 0.77), "white": (0.93, 0.93, 0.91), "cream": (0.88, 0.82, 0.66),
    "tan": (0.68, 0.54, 0.37), "brown": (0.38, 0.25, 0.16), "maroon": (0.42, 0.10, 0.15),
    "red": (0.78, 0.13, 0.13), "orange": (0.90, 0.47, 0.12), "yellow": (0.93, 0.80, 0.20),
    "olive": (0.40, 0.42, 0.18), "green": (0.14, 0.48, 0.22), "teal": (0.10, 0.50, 0.50),
    "sky": (0.45, 0.70, 0.90), "blue": (0.14, 0.30, 0.72), "navy": (0.10, 0.13, 0.34),
    "purple": (0.42, 0.20, 0.55), "pink": (0.92, 0.58, 0.68),
}
MOTIFS = ("disc", "ring", "triangle", "cross", "bar", "two_bars", "post", "square", "diamond", "chevron", "glyph")


@dataclass(frozen=True)
class Nuisance:
    """How hard the pictures are, apart from the look-alikes. `strength` scales every camera's look, 0 = none."""

    strength: float
    occlusion: float    # probability that a frame has an occluder in front
    align: float        # scales box shift and scale error; 0 = perfect boxes
    jitter: float       # scales exposure changes from frame to frame
    bystander: float = 0.15
    shadow: float = 0.30


@dataclass(frozen=True)
class Camera:
    """One fixed camera: its look, its lamp and the direction from which it usually sees its subjects."""

    index: int
    gain: np.ndarray        # 3, per channel
    mix: np.ndarray         # 3 x 3 colour matrix
    gamma: float
    haze: float
    noise: float            # standard deviation in [0, 1]
    blur: float             # weight of each neighbour in a 3-tap kernel
    shrink: float           # resolution kept, <= 1
    vignette: float
    quality: int            # JPEG
    lamp: float             # azimuth of the light as the camera sees it
    ambient: float
    yaw: float
    yaw_spread: float
    pitch: float
    panorama: np.ndarray    # h x w x 3


@dataclass(frozen=True)
class Picture:
    """One finished image with its truth. `parts` is 0 on background, else the part's number."""

    image: np.ndarray       # H x W x 3 uint8
    mask: np.ndarray        # H x W bool: visible foreground
    parts: np.ndarray       # H/2 x W/2 uint8
    quality: int
    truth: dict[str, Any]


def colour(name: str) -> np.ndarray:
    return np.asarray(PALETTE[name], np.float32)


def pick(rng: np.random.Generator, table: dict[str, float]) -> str:
    """One key of a table of weights."""
    weights = np.fromiter(table.values(), float)
    return list(table)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def contrasting(rng: np.random.Generator, *others: str, least: float = 0.45) -> str:
    """A palette colour at RGB distance of `least` or more from each of `others`: a cue nobody can see is none."""
    far = [name for name, value in PALETTE.items()
           if all(np.linalg.norm(np.subtract(value, PALETTE[other])) >= least for other in others)]
    return far[int(rng.integers(len(far)))]


@functools.lru_cache(maxsize=512)
def motif(name: str, code: int, height: int, width: int) -> np.ndarray:
    """A mark as a boolean mask, height x width. "glyph" is text-like: 3 x 5 cells from `code`, so that no font is
    needed and every machine draws the same one."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    radius = np.hypot(x, y)
    shapes = {
        "disc": lambda: radius < 0.9,
        "ring": lambda: (radius < 0.95) & (radius > 0.5),
        "triangle": lambda: (np.abs(x) < (y + 1) / 2) & (y < 0.9),
        "cross": lambda: (np.abs(x) < 0.28) | (np.abs(y) < 0.28),
        "bar": lambda: (np.abs(y) < 0.38) & (np.abs(x) < 2),
        "two_bars": lambda: (np.abs(np.abs(y) - 0.6) < 0.26) & (np.abs(x) < 2),
        "post": lambda: (np.abs(x) < 0.38) & (np.abs(y) < 2),
        "square": lambda: np.maximum(np.abs(x), np.abs(y)) < 0.85,
        "diamond": lambda: np.abs(x) + np.abs(y) < 1,
        "chevron": lambda: np.abs(y - np.abs(x) + 0.45) < 0.38,
        "glyph": lambda: _glyph(code)[((y + 1) * 2.49).astype(int), ((x + 1) * 1.49).astype(int)],
    }
    return np.broadcast_to(shapes[name](), (height, width))


def _glyph(code: int) -> np.ndarray:
    cells = np.random.default_rng([code, 35]).random((5, 3)) < 0.58
    cells[[0, 4], 1] = True
    return cells


def stamp(texture: np.ndarray, name: str, code: int, ink: np.ndarray, top: float, left: float, height: float,
          width: float) -> None:
    """Paint a motif on a texture in place; the box is in fractions of the texture and wraps around sideways."""
    rows, columns = texture.shape[:2]
    mask = motif(name, code, max(3, round(height * rows)), max(3, round(width * columns)))
    y, x = np.nonzero(mask)
    y = y + round(top * rows)
    x = (x + round(left * columns)) % columns
    keep = (y >= 0) & (y < rows)
    texture[y[keep], x[keep], :3] = ink


def make_camera(seed: int, kind: str, index: int, strength: float, height: int, width: int) -> Camera:
    """Camera `index` (from 0) of a data set; the same arguments always give the same camera."""
    stream = 1 if kind == "people" else 2
    rng = np.random.default_rng([seed, stream, 11, index])
    s = strength
    gain = 2 ** rng.uniform(-0.75 * s, 0.55 * s) * 2 ** rng.uniform(-0.42 * s, 0.42 * s, 3)
    grey = rng.uniform(0, 0.65 * s)
    mix = (1 - grey) * np.eye(3) + grey / 3 + rng.uniform(-0.10 * s, 0.10 * s, (3, 3))
    spread = (18, 40) if kind == "people" else (10, 22)
    yaw = rng.uniform(-180, 180) if kind == "people" else rng.uniform(15, 60) * rng.choice([-1, 1])
    return Camera(
        index=index, gain=gain.astype(np.float32), mix=mix.astype(np.float32),
        gamma=float(2 ** rng.uniform(-0.55 * s, 0.55 * s)), haze=float(rng.uniform(0, 0.25 * s)),
        noise=float((2 + rng.uniform(0, 9) * s) / 255), blur=float(rng.uniform(0, 0.30 * s)),
        shrink=float(1 - rng.uniform(0, 0.55 * s)), vignette=float(rng.uniform(0, 0.35 * s)),
        quality=int(95 - rng.uniform(10, 60) * s), lamp=float(np.radians(rng.uniform(-70, 70))),
        ambient=float(rng.uniform(0.45, 0.75)), yaw=float(np.radians(yaw)),
        yaw_spread=float(np.radians(rng.uniform(*spread))),
        pitch=float(np.radians(rng.uniform(4, 14) if kind == "people" else rng.uniform(12, 30))),
        panorama=_panorama(np.random.default_rng([seed, stream, 12, index]), height, width))


def _panorama(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A street as one camera sees it: a wall over a floor, clutter, uneven light; 1.5 boxes high, 10 boxes wide."""
    rows, columns = round(1.5 * height), 10 * width
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    horizon = round(0.78 * height)
    view = np.empty((rows, columns, 3), np.float32)
    wall = rng.uniform(0.25, 0.85) * rng.uniform(0.65, 1, 3)
    floor = rng.uniform(0.25, 0.75) * rng.uniform(0.75, 1, 3)
    view[:horizon], view[horizon:] = wall, floor
    unit = height / 128
    module = rng.uniform(8, 18) * unit
    kind = rng.choice(["brick", "shutter", "panel", "window"])
    if kind == "brick":
        shifted = x + np.where((y // module) % 2 > 0, module, 0)
        lines = (y % module < 1.5 * unit) | (shifted % (2 * module) < 1.5 * unit)
    elif kind == "shutter":
        lines = y % (0.6 * module) < 1.8 * unit
    elif kind == "panel":
        lines = x % (3 * module) < 2 * unit
    else:
        lines = (x % (4 * module) < 2 * module) & (y % (3 * module) < 1.8 * module)
    lines[horizon:] = False
    view[lines] = wall * rng.choice([0.6, 0.75, 1.2])
    tile = rng.uniform(10, 26) * unit
    slant = x + (y - horizon) * rng.choice([0.0, 0.6, -0.6])
    joints = ((slant % tile) < 1.5 * unit) | ((y % (0.6 * tile)) < 1.2 * unit)
    if rng.random() < 0.3:
        joints = (slant % (2.4 * tile)) < tile          # a crossing
    joints[:horizon] = False
    view[joints] = floor * rng.choice([0.7, 0.85, 1.25])
    for _ in range(int(rng.integers(14, 32))):
        _clutter(view, rng, horizon, unit)
    light = rng.uniform(0.6, 1.15, (3, 14)).astype(np.float32)
    smooth = Image.fromarray(light).resize((columns, rows), Image.Resampling.BICUBIC)
    return np.clip(view * np.asarray(smooth)[..., None], 0, 1)


def _clutter(view: np.ndarray, rng: np.random.Generator, horizon: int, unit: float) -> None:
    """One thing in the street, painted in place: post, poster, shrub, crate or a distant walker."""
    rows, columns = view.shape[:2]
    ink = np.asarray(list(PALETTE.values())[int(rng.integers(len(PALETTE)))], np.float32) * rng.uniform(0.6, 1)
    x = int(rng.integers(columns - round(50 * unit)))
    thing = rng.choice(["post", "poster", "shrub", "crate", "walker"])

    def box(top: float, left: float, high: float, wide: float, tint: np.ndarray) -> None:
        view[max(0, round(top)):max(0, round(top + high)), round(left):round(left + wide)] = tint

    if thing == "post":
        box(0, x, rows, rng.uniform(2, 6) * unit, ink)
    elif thing == "poster":
        high, wide = rng.uniform(14, 34) * unit, rng.uniform(12, 34) * unit
        top = rng.uniform(0.1, 0.9) * (horizon - high)
        box(top, x, high, wide, ink)
        box(top + high / 3, x + wide / 4, high / 4, wide / 2, 1 - ink)
    elif thing == "crate":
        box(horizon - 6 * unit, x, rng.uniform(12, 30) * unit, rng.uniform(10, 26) * unit, ink)
    elif thing == "shrub":
        r = rng.uniform(7, 16) * unit
        y0, x0 = np.ogrid[:rows, :columns]
        view[(y0 - horizon) ** 2 + (x0 - x) ** 2 < r * r] = ink * (0.5, 0.9, 0.5)
    else:
        s = rng.uniform(0.45, 0.7) * unit
        foot = horizon + rng.uniform(4, 16) * unit
        for top, left, high, wide, dim in ((-100, 7, 14, 12, 0.7), (-86, 0, 44, 26, 1.0), (-44, 4, 44, 18, 0.5)):
            box(foot + top * s, x + left * s, high * s, wide * s, ink * dim)


def crop(camera: Camera, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The piece of the panorama behind a box; x and y in [0, 1] say where."""
    rows, columns = camera.panorama.shape[:2]
    top = int(np.clip(y, 0, 1) * (rows - height))
    left = int(np.clip(x, 0, 1) * (columns - width))
    return camera.panorama[top:top + height, left:left + width].copy()


def disturb(
    image: np.ndarray, mask: np.ndarray, parts: np.ndarray, nuisance: Nuisance, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """A cast shadow and an occluder over ``image`` (changed in place), each as often as ``nuisance`` says.

    ``mask`` (H x W bool) is the subject, ``parts`` (H x W) its part numbers. Returns what of both is still seen, and
    the fraction of the subject that is hidden.
    """
    whole = max(1, int(mask.sum()))
    if rng.random() < nuisance.shadow:
        cast_shadow(image, rng)
    if rng.random() < nuisance.occlusion:
        hidden = occlude(image, rng)
        mask, parts = mask & ~hidden, np.where(hidden, 0, parts)
    return mask, parts, 1 - int(mask.sum()) / whole


def occlude(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint one thing in front of the subject, in place, and return where it is (H x W bool)."""
    height, width = image.shape[:2]
    covered = np.zeros((height, width), bool)
    kind = pick(rng, {"pole": 0.3, "barrier": 0.3, "crate": 0.2, "wall": 0.2})
    if kind == "pole":
        wide = max(2, int(rng.uniform(0.08, 0.18) * width))
        left = int(rng.uniform(0.1, 0.8) * width)
        covered[:, left:left + wide] = True
    elif kind == "barrier":
        covered[int(rng.uniform(0.62, 0.86) * height):] = True
    elif kind == "crate":
        top, left = int(rng.uniform(0.5, 0.8) * height), int(rng.uniform(-0.2, 0.7) * width)
        covered[top:, max(0, left):max(0, left + int(0.5 * width))] = True
    else:
        wide = int(rng.uniform(0.15, 0.36) * width)
        side = slice(0, wide) if rng.random() < 0.5 else slice(width - wide, width)
        covered[:, side] = True
    ink = rng.uniform(0.15, 0.8) * rng.uniform(0.6, 1, 3)
    grain = np.where(np.arange(height) % max(3, int(rng.uniform(4, 12))) == 0, 0.7, 1.0)[:, None, None]
    image[covered] = np.broadcast_to(ink * grain, image.shape)[covered]
    return covered


def cast_shadow(image: np.ndarray, rng: np.random.Generator) -> None:
    """Darken one side of a random line, in place."""
    height, width = image.shape[:2]
    y, x = np.ogrid[:height, :width]
    slope = rng.uniform(-1.2, 1.2)
    side = (y / height - 0.5) - slope * (x / width - 0.5) > rng.uniform(-0.35, 0.35)
    image[side] *= rng.uniform(0.5, 0.75)


def reduce(rgb: np.ndarray, alpha: np.ndarray, part: np.ndarray, factor: int
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour (premultiplied), coverage and part number at 1 / factor of the size; the mean of each block of pixels."""
    height, width = alpha.shape[0] // factor, alpha.shape[1] // factor
    return (rgb.reshape(height, factor, width, factor, 3).mean((1, 3)),
            alpha.reshape(height, factor, width, factor).mean((1, 3)), part[factor // 2::factor, factor // 2::factor])


def ground_shadow(image: np.ndarray, foot: tuple[float, float], half_width: float, half_height: float) -> None:
    """Darken a soft ellipse around a point of the floor, in place; lengths in pixels."""
    height, width = image.shape[:2]
    top, end = max(0, int(foot[1] - 2 * half_height)), min(height, int(foot[1] + 2 * half_height) + 1)
    if top >= end:
        return
    y = (np.arange(top, end, dtype=np.float32)[:, None] - foot[1]) / half_height
    x = (np.arange(width, dtype=np.float32)[None, :] - foot[0]) / half_width
    image[top:end] *= (1 - 0.45 * np.exp(-(x * x + y * y)))[..., None]


def photograph(image: np.ndarray, camera: Camera, exposure: float, rng: np.random.Generator) -> np.ndarray:
    """What the camera records of a scene, H x W x 3 float -> uint8; `exposure` is in stops."""
    height, width = image.shape[:2]
    # written out, not `@`: a BLAS may round otherwise with another number of threads, and bytes must not change
    mixed = image[..., :1] * camera.mix[:, 0] + image[..., 1:2] * camera.mix[:, 1] + image[..., 2:] * camera.mix[:, 2]
    seen = np.clip(mixed * (camera.gain * np.float32(2 ** exposure)), 0, 1)
    seen **= np.float32(camera.gamma)
    seen = seen * np.float32(1 - camera.haze) + np.float32(0.75 * camera.haze)
    if camera.vignette:
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        seen *= (1 - np.float32(camera.vignette / 2) * (x * x + y * y))[..., None]
    if camera.blur:
        b = np.float32(camera.blur)
        seen[1:-1] = (1 - 2 * b) * seen[1:-1] + b * (seen[:-2] + seen[2:])
        seen[:, 1:-1] = (1 - 2 * b) * seen[:, 1:-1] + b * (seen[:, :-2] + seen[:, 2:])
    # an 8-bit grain with a fixed table of normals would repeat; float32 normals are cheap enough
    seen += np.float32(camera.noise) * rng.standard_normal(seen.shape, dtype=np.float32)
    pixels = (np.clip(seen, 0, 1) * 255 + 0.5).astype(np.uint8)
    if camera.shrink > 0.98:
        return pixels
    small = Image.fromarray(pixels).resize(
        (max(8, round(width * camera.shrink)), max(8, round(height * camera.shrink))), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))

"""A walking figure: a skeleton posed by a gait phase, and the painter of its tapered, textured cylinders.

The idea: about 25 cylinders, each with a radius profile and a (row, angle) texture, are turned by a yaw, projected
without perspective, sorted by depth and painted far to near. Every pixel of a cylinder knows its place along the axis
and its angle around it, so a texture turns with the body.

Axes: X to the person's left, Y up, Z forward, in statures (feet at 0, crown at 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from autoreid.data.drawn_people import Figure, Person

PARTS = ("background", "head", "torso", "arms", "hands", "legs", "shoes", "bag", "other")
HEAD, TORSO, ARMS, HANDS, LEGS, SHOES, BAG, OTHER = range(1, 9)
TAU = 2 * np.pi

ANGLES = np.arcsin(np.linspace(-1, 1, 129))     # the surface angle at 129 places across a cylinder


class Canvas:
    """Premultiplied colour, coverage and part number at SUPER times the picture's size."""

    def __init__(self, height: int, width: int, lamp: float, ambient: float) -> None:
        self.rgb = np.zeros((height, width, 3), np.float32)
        self.alpha = np.zeros((height, width), np.float32)
        self.part = np.zeros((height, width), np.uint8)
        facing = np.maximum(np.cos(ANGLES - lamp), 0)
        self.shade = (ambient + (1 - ambient) * facing).astype(np.float32)
        self.x = np.arange(width, dtype=np.float32)[None, :] + 0.5
        self.y = np.arange(height, dtype=np.float32)[:, None] + 0.5

    def tube(self, top: np.ndarray, end: np.ndarray, radius: np.ndarray, texture: np.ndarray, yaw: float, part: int,
             flat: float = 1.0) -> None:
        """Paint a cylinder from screen point `top` to `end` (x, y pixels) with a radius profile (pixels). The ends are
        half discs; `flat` > 1 flattens them."""
        height, width = self.alpha.shape
        reach = float(radius.max()) + 1
        x0, x1 = max(0, int(min(top[0], end[0]) - reach)), min(width, int(max(top[0], end[0]) + reach) + 2)
        y0, y1 = max(0, int(min(top[1], end[1]) - reach)), min(height, int(max(top[1], end[1]) + reach) + 2)
        if x0 >= x1 or y0 >= y1:
            return
        along = end - top
        length = max(float(math.hypot(along[0], along[1])), 0.5)
        ux, uy = float(along[0]) / length, float(along[1]) / length
        dx, dy = self.x[:, x0:x1] - np.float32(top[0]), self.y[y0:y1] - np.float32(top[1])
        axial = dx * np.float32(ux) + dy * np.float32(uy)
        across = dx * np.float32(uy) - dy * np.float32(ux)
        inside = np.clip(axial, 0, np.float32(length))
        over = (axial - inside) * np.float32(flat)
        t = inside * np.float32(1 / length)
        r = radius[(t * (len(radius) - 1)).astype(np.intp)]
        alpha = np.clip(r + np.float32(0.5) - np.sqrt(across * across + over * over), 0, 1)
        rows, columns = np.nonzero(alpha)
        if not len(rows):
            return
        a = alpha[rows, columns]
        place = np.clip((across[rows, columns] / r[rows, columns] + 1) * 64, 0, 128).astype(np.intp)
        phi = ((ANGLES - yaw) / TAU + 0.5) % 1
        column_of = np.minimum((phi * texture.shape[1]).astype(np.intp), texture.shape[1] - 1)
        row_of = np.minimum((t[rows, columns] * texture.shape[0]).astype(np.intp), texture.shape[0] - 1)
        ink = texture[row_of, column_of[place]] * self.shade[place][:, None]
        rows += y0
        columns += x0
        self.rgb[rows, columns] = self.rgb[rows, columns] * (1 - a)[:, None] + ink * a[:, None]
        self.alpha[rows, columns] = self.alpha[rows, columns] * (1 - a) + a
        solid = a > 0.5
        self.part[rows[solid], columns[solid]] = part


def _profile(*knots: tuple[float, float]) -> np.ndarray:
    places, values = zip(*knots)
    return np.interp(np.linspace(0, 1, 48), places, values).astype(np.float32)


PROFILES = {
    "torso": _profile((0, 0.060), (0.07, 0.094), (0.16, 0.104), (0.38, 0.101), (0.68, 0.084), (1, 0.093)),
    "coat": _profile((0, 0.060), (0.05, 0.096), (0.12, 0.107), (0.3, 0.103), (0.5, 0.090), (1, 0.118)),
    "thigh": _profile((0, 0.054), (0.4, 0.053), (1, 0.038)), "shin": _profile((0, 0.038), (0.3, 0.040), (1, 0.025)),
    "upper": _profile((0, 0.037), (0.5, 0.034), (1, 0.028)), "fore": _profile((0, 0.028), (0.3, 0.029), (1, 0.020)),
    "head": _profile((0, 0.034), (0.25, 0.050), (0.6, 0.049), (1, 0.034)), "neck": _profile((0, 0.027), (1, 0.032)),
    "hand": _profile((0, 0.020), (1, 0.018)), "shoe": _profile((0, 0.026), (0.5, 0.029), (1, 0.022)),
    "pelvis": _profile((0, 0.086), (0.5, 0.090), (1, 0.070)), "belt": _profile((0, 0.093), (1, 0.094)),
    "scarf": _profile((0, 0.046), (1, 0.058)), "skirt": _profile((0, 0.084), (0.3, 0.098), (1, 0.128)),
    "pack": _profile((0, 0.066), (0.15, 0.080), (0.8, 0.084), (1, 0.074)), "bag": _profile((0, 0.050), (1, 0.058)),
    "brim": _profile((0, 0.030), (1, 0.024)), "tail": _profile((0, 0.020), (0.6, 0.024), (1, 0.010)),
    "mane": _profile((0, 0.046), (0.5, 0.054), (1, 0.048)), "hood": _profile((0, 0.050), (1, 0.060)),
    "dome": _profile((0, 0.044), (1, 0.053)),
}


def paint(canvas: Canvas, figure: Figure, yaw: float, phase: float, stride: float, foot: tuple[float, float],
          pixels: float, pitch: float) -> None:
    """Paint a figure standing at screen point `foot` (x, y), one stature `pixels` high, from far to near."""
    person = figure.person
    cos, sin, cosp, sinp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    tubes: list[tuple[float, tuple]] = []

    def add(name: str, top: np.ndarray, end: np.ndarray, profile: str, part: int, bias: float = 0.0, thin: float = 1.0,
            wide: float = 1.0, flat: float = 1.0, turn: float = 0.0) -> None:
        """Queue a tube; `thin` is depth over width of its cross-section, `turn` its own yaw."""
        ends = []
        depth = 0.0
        for x, y, z in (top, end):
            near = -x * sin + z * cos
            depth += near / 2
            ends.append(np.array((foot[0] + (x * cos + z * sin) * pixels,
                                  foot[1] - (y * cosp - near * sinp) * pixels)))
        girth = math.hypot(math.cos(yaw + turn), thin * math.sin(yaw + turn)) * wide * pixels
        tubes.append((depth + bias, (ends[0], ends[1], PROFILES[profile] * np.float32(girth), figure.textures[name],
                                     yaw + turn, part, flat)))

    _pose(person, phase, stride, add)
    for _, tube in sorted(tubes, key=lambda item: item[0]):
        canvas.tube(*tube)


def _pose(person: Person, phase: float, stride: float, add: Callable) -> None:
    """Queue all the parts of a walking person. `stride` 0 stands, 1 walks briskly."""
    h, b, hip = person.height, person.build, person.leg
    swing = 0.42 * stride * math.sin(phase)
    thigh, shin = 0.5 * (hip - 0.03), 0.5 * (hip - 0.03)
    legs = {}
    for side in (-1, 1):
        a = swing * side
        knee = 0.06 + 0.75 * stride * max(0.0, math.cos(phase) * side) * 0.8
        x = 0.045 * b * side
        top = np.array((x, hip, 0.0))
        mid = top + thigh * np.array((0, -math.cos(a), math.sin(a)))
        end = mid + shin * np.array((0, -math.cos(a - knee), math.sin(a - knee)))
        legs[side] = (top, mid, end, a - knee)
    lift = min(ends[2][1] for ends in legs.values()) - 0.035
    down = np.array((0, -lift, 0))

    def at(x: float, y: float, z: float = 0.0) -> np.ndarray:
        return (np.array((x, y, z)) + down) * h

    for side, (top, mid, end, lean) in legs.items():
        top, mid, end = ((p + down) * h for p in (top, mid, end))
        add(f"thigh{side}", top, mid, "thigh", LEGS, bias=-0.06, wide=b)
        add(f"shin{side}", mid, end, "shin", LEGS, bias=-0.065, wide=b)
        toe = end + np.array((0.012 * side, -0.012 + 0.06 * min(0.0, lean), 0.085)) * h
        add("sole", end + (0, -0.008, -0.018), toe + (0, -0.010, 0), "shoe", SHOES, bias=-0.07)
        add("shoe", end + (0, 0, -0.012), toe, "shoe", SHOES, bias=-0.062)
    waist = hip + 0.035
    shoulder = 0.842
    add("pelvis", at(0, waist), at(0, hip - 0.03), "pelvis", LEGS, bias=-0.05, thin=0.74, wide=b)
    if person.bottom_kind == "skirt":
        add("skirt", at(0, waist), at(0, hip * 0.56), "skirt", LEGS, bias=0.02, thin=0.86, wide=b, flat=3)
    bottom = hip * 0.72 if person.coat else hip + 0.01
    add("torso", at(0, shoulder), at(0, bottom), "coat" if person.coat else "torso", TORSO, bias=0.03, thin=0.68,
        wide=b, flat=2.5)
    if person.belt:
        middle = 0.5 * (shoulder + hip) - 0.07 if person.coat else hip + 0.022
        add("belt", at(0, middle + 0.014), at(0, middle - 0.014), "belt", OTHER, bias=0.035, thin=0.70, wide=b, flat=4)
    for side in (-1, 1):
        a = -0.75 * swing * side
        start = (0.112 * b * side, shoulder - 0.042, 0.0)
        elbow = (start[0] + 0.022 * side, start[1] - 0.165 * math.cos(a), 0.165 * math.sin(a))
        bend = a + 0.30 + 0.25 * stride
        wrist = (elbow[0] + 0.004 * side, elbow[1] - 0.135 * math.cos(bend), elbow[2] + 0.135 * math.sin(bend))
        palm = (wrist[0], wrist[1] - 0.035 * math.cos(bend), wrist[2] + 0.035 * math.sin(bend))
        add(f"upper{side}", at(*start), at(*elbow), "upper", ARMS, bias=0.032, wide=b)
        add(f"fore{side}", at(*elbow), at(*wrist), "fore", ARMS, bias=0.034, wide=b)
        add("skin", at(*wrist), at(*palm), "hand", HANDS, bias=0.033)
        if person.bag and person.bag[0] == "hand" and person.bag[3] == side:
            x, y, z = palm
            add("bag", at(x, y - 0.04, z), at(x, y - 0.14, z), "bag", BAG, bias=0.036, thin=1.8, wide=0.75, flat=5)
    if person.bag and person.bag[0] == "backpack":
        add("bag", at(0, shoulder - 0.03, -0.105), at(0, hip + 0.06, -0.105), "pack", BAG, thin=0.8, flat=2)
    if person.bag and person.bag[0] == "shoulder":
        x = 0.125 * b * person.bag[3]
        add("bag", at(x, hip + 0.05, -0.01), at(x, hip - 0.08, -0.01), "bag", BAG, bias=0.04, thin=1.7, wide=0.85,
            flat=5)
    _head(person, at, add)


def _head(person: Person, at: Callable, add: Callable) -> None:
    """Queue neck, scarf, head and what is on it."""
    style = person.hair[0]
    add("skin", at(0, 0.885), at(0, 0.835), "neck", HEAD, bias=0.031)
    if person.scarf:
        add("scarf", at(0, 0.868), at(0, 0.838), "scarf", OTHER, bias=0.037, thin=0.9)
    add("head", at(0, 0.972, 0.008), at(0, 0.893, 0.014), "head", HEAD, bias=0.04, thin=1.12)
    if style == "long":
        add("hair", at(0, 0.955, -0.020), at(0, 0.815, -0.034), "mane", HEAD, bias=0.036, thin=0.8, flat=1.6)
    elif style == "pony":
        add("hair", at(0, 0.945, -0.062), at(0, 0.815, -0.085), "tail", HEAD, bias=0.03)
    elif style == "hood":
        add("hair", at(0, 0.965, -0.016), at(0, 0.865, -0.026), "hood", HEAD, bias=0.035, thin=1.1)
    elif style == "cap":
        add("hair", at(0, 0.985, 0.004), at(0, 0.958, 0.006), "dome", HEAD, bias=0.042, thin=1.12, flat=1.3)
        add("hair", at(0, 0.952, 0.045), at(0, 0.946, 0.085), "brim", HEAD, bias=0.02)

"""A vehicle's body: side profiles swept across the width, projected without perspective and filled far to near.

The idea: every face is a textured trapezoid with a straight middle line and a constant lateral direction: strips lie
across the vehicle (lateral = y), sides along it (lateral = x). Under an orthographic camera such a face maps to the
screen by one affine map and one division, so its pixels are found and sampled with a few array operations.

Axes as in drawn_vehicles: x forward, y left, z up, in vehicle lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PARTS = ("background", "body", "glass", "lights", "wheels", "roof")
BODY, GLASS, LIGHTS, WHEELS, ROOF = range(1, 6)
LEAN = 0.32         # how far the greenhouse leans in, y per z


@dataclass(frozen=True)
class Body:
    """The proportions of one type. `strips`: name -> ((x, z) of its first row, (x, z) of its last row)."""

    height: float
    waist: float
    deck: float                             # z of boot or bed at the tail
    nose: float                             # z of the bonnet at the nose
    screen: tuple[float, float]             # x of the greenhouse at the waist: front, rear
    roof: tuple[float, float]               # x of the roof: front, rear
    doors: tuple[float, float]
    door_count: int
    windows: tuple[tuple[float, float], ...]
    decal_z: tuple[float, float]
    axles: tuple[float, float] = (-0.30, 0.31)
    wheel: float = 0.072
    sill: float = 0.055
    lean: float = LEAN
    nose_x: float = 0.5
    tail_x: float = -0.5

    @property
    def tall_rear(self) -> bool:
        return self.screen[1] < self.tail_x + 0.06

    @property
    def strips(self) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
        front, rear = self.screen
        out = {
            "front": ((self.nose_x, self.nose), (self.nose_x, self.sill)),
            "bonnet": ((front, self.waist), (self.nose_x, self.nose)),
            "windscreen": ((self.roof[0], self.height), (front, self.waist)),
            "roof": ((self.roof[1], self.height), (self.roof[0], self.height)),
            "rear_window": ((self.roof[1], self.height), (rear, self.waist)),
            "tail": ((self.tail_x, self.deck), (self.tail_x, self.sill)),
        }
        if rear > self.tail_x + 0.02:
            out["boot" if self.deck >= self.waist else "bed"] = ((self.tail_x, self.deck), (rear, self.waist))
        return out


PROFILES = {
    "sedan": Body(0.335, 0.215, 0.215, 0.175, (0.22, -0.31), (0.08, -0.17), (-0.20, 0.20), 2,
                  ((-0.27, -0.02), (0.0, 0.20)), (0.095, 0.205)),
    "hatchback": Body(0.365, 0.225, 0.225, 0.185, (0.26, -0.48), (0.11, -0.36), (-0.22, 0.22), 2,
                      ((-0.40, -0.24), (-0.21, 0.0), (0.02, 0.24)), (0.095, 0.215), wheel=0.076),
    "suv": Body(0.425, 0.265, 0.265, 0.225, (0.24, -0.49), (0.12, -0.44), (-0.22, 0.22), 2,
                ((-0.45, -0.24), (-0.21, 0.0), (0.02, 0.22)), (0.11, 0.255), wheel=0.086, sill=0.07),
    "van": Body(0.46, 0.255, 0.255, 0.20, (0.40, -0.495), (0.24, -0.48), (0.02, 0.28), 1,
                ((0.08, 0.36),), (0.13, 0.36), lean=0.14),
    "pickup": Body(0.39, 0.235, 0.225, 0.205, (0.25, -0.08), (0.14, -0.03), (-0.05, 0.22), 1,
                   ((-0.05, 0.22),), (0.10, 0.22), wheel=0.084, sill=0.065),
    "truck": Body(0.52, 0.24, 0.24, 0.235, (0.485, -0.497), (0.43, -0.495), (0.28, 0.44), 1,
                  ((0.30, 0.45),), (0.16, 0.42), lean=0.05, wheel=0.08, sill=0.075),
}


@dataclass(frozen=True)
class Face:
    """A trapezoid: its middle line runs from `first` to `last` (row 0 to the last row of the texture), and it reaches
    `half_first` to `half_last` along the unit vector `lateral`. The texture is rows x columns x (R, G, B, part); part 0
    is transparent. `normal` points outwards; a higher `layer` is painted later whatever its depth."""

    first: np.ndarray
    last: np.ndarray
    lateral: np.ndarray
    half_first: float
    half_last: float
    texture: np.ndarray
    normal: np.ndarray
    layer: int = 0


def _face(first: np.ndarray, last: np.ndarray, lateral: np.ndarray, half: tuple[float, float], texture: np.ndarray,
          inside: np.ndarray, layer: int = 0) -> Face:
    """A face whose normal points away from the point `inside`."""
    normal = np.cross(lateral, last - first)
    normal /= max(float(np.linalg.norm(normal)), 1e-9)
    if normal @ ((first + last) / 2 - inside) < 0:
        normal = -normal
    return Face(first, last, lateral, *half, texture, normal, layer)


def body_faces(body: Body, width: float, stretch: float, strips: dict[str, np.ndarray],
               sides: dict[int, np.ndarray]) -> list[Face]:
    """All faces of a body without its loads; `stretch` lengthens it against its height."""
    core = np.array((0.0, 0.0, 0.55 * body.waist))
    y_axis, x_axis = np.array((0.0, 1.0, 0.0)), np.array((1.0, 0.0, 0.0))

    def half(z: float) -> float:
        return width / 2 - body.lean * max(0.0, z - body.waist)

    faces = []
    for name, ((x0, z0), (x1, z1)) in body.strips.items():
        halves = (half(z0), half(z1))
        faces.append(_face(np.array((x0, 0, z0)), np.array((x1, 0, z1)), y_axis, halves, strips[name], core))
    for side, texture in sides.items():
        texture = _cut(texture, body)
        rows = len(texture)
        split = round((1 - body.waist / body.height) * rows)
        waist = body.height * (1 - split / rows)
        middle = (body.nose_x + body.tail_x) / 2
        reach = (body.nose_x - body.tail_x) / 2
        for top, bottom, rows_of in ((body.height, waist, slice(0, split)), (waist, 0.0, slice(split, rows))):
            first, last = (np.array((middle, side * half(z), z)) for z in (top, bottom))
            faces.append(_face(first, last, x_axis, (reach, reach), texture[rows_of], core))
    tyre = np.full((1, 1, 4), 0.05, np.float32)
    tyre[..., 3] = WHEELS
    for axle in body.axles:
        for y in (-1, 1):
            faces += box(axle, y * (width / 2 - 0.035), body.wheel * 0.85, body.wheel * 0.6, 0.03, body.wheel * 0.85,
                         tyre[0, 0, :3], WHEELS, layer=-1)
    scale = np.array((stretch, 1.0, 1.0))
    return [Face(f.first * scale, f.last * scale, f.lateral, f.half_first * (stretch if f.lateral[0] else 1),
                 f.half_last * (stretch if f.lateral[0] else 1), f.texture, f.normal, f.layer) for f in faces]


def _cut(texture: np.ndarray, body: Body) -> np.ndarray:
    """Make transparent what lies outside the side profile."""
    rows, columns = texture.shape[:2]
    x = ((np.arange(columns) + 0.5) / columns * (body.nose_x - body.tail_x) + body.tail_x)[None, :]
    z = (body.height * (1 - (np.arange(rows) + 0.5) / rows))[:, None]
    up = np.clip((z - body.waist) / (body.height - body.waist), 0, 1)
    (front, rear), (roof_front, roof_rear) = body.screen, body.roof
    above = (x < front + up * (roof_front - front)) & (x > rear + up * (roof_rear - rear))
    top = np.interp(x, (body.tail_x, rear, front, body.nose_x), (body.deck, body.waist, body.waist, body.nose))
    texture = texture.copy()
    texture[~np.where(z > body.waist, above, z <= top), 3] = 0
    return texture


def box(x: float, y: float, z: float, half_x: float, half_y: float, half_z: float, ink: np.ndarray, part: int,
        layer: int = 1) -> list[Face]:
    """The five upper faces of a small box in one colour."""
    texture = np.empty((1, 1, 4), np.float32)
    texture[..., :3], texture[..., 3] = ink, part
    centre = np.array((x, y, z))
    ex, ey, ez = np.diag((half_x, half_y, half_z))
    x_axis, y_axis = np.array((1.0, 0.0, 0.0)), np.array((0.0, 1.0, 0.0))
    faces = [_face(centre + ez - ex, centre + ez + ex, y_axis, (half_y, half_y), texture, centre, layer)]
    for sign in (-1, 1):
        for offset, axis, half in ((sign * ex, y_axis, half_y), (sign * ey, x_axis, half_x)):
            middle = centre + offset
            faces.append(_face(middle + ez, middle - ez, axis, (half, half), texture, centre, layer))
    return faces


def project(yaw: float, pitch: float) -> tuple[np.ndarray, np.ndarray]:
    """The screen axes (2 x 3: right, down) and the direction to the camera (3) for a yaw and a pitch."""
    cos, sin, cosp, sinp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    screen = np.array(((-sin, cos, 0.0), (sinp * cos, sinp * sin, -cosp)))
    return screen, np.array((cosp * cos, cosp * sin, sinp))


def extent(faces: list[Face], screen: np.ndarray) -> np.ndarray:
    """Smallest and largest screen coordinates of all corners, 2 x 2."""
    corners = np.array([point + sign * half * face.lateral for face in faces for sign in (-1, 1)
                        for point, half in ((face.first, face.half_first), (face.last, face.half_last))]) @ screen.T
    return np.stack([corners.min(0), corners.max(0)])


def paint_faces(faces: list[Face], screen: np.ndarray, to_camera: np.ndarray, scale: np.ndarray, offset: np.ndarray,
                light: np.ndarray, ambient: float, height: int, width: int
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill the faces that look at the camera; pixel = screen point * scale + offset. Returns colour (height x width x
    3), coverage (0 or 1, float32) and part number."""
    rgb = np.zeros((height, width, 3), np.float32)
    part = np.zeros((height, width), np.uint8)
    x_all = np.arange(width, dtype=np.float32)[None, :] + 0.5
    y_all = np.arange(height, dtype=np.float32)[:, None] + 0.5
    seen = [face for face in faces if face.normal @ to_camera > 0.01]
    for face in sorted(seen, key=lambda f: (f.layer, (f.first + f.last) @ to_camera)):
        origin = screen @ face.first * scale + offset
        down = screen @ (face.last - face.first) * scale
        aside = screen @ face.lateral * scale
        determinant = down[0] * aside[1] - down[1] * aside[0]
        if abs(determinant) < 1e-6:
            continue
        corners = np.array([origin + aside * s * face.half_first for s in (-1, 1)]
                           + [origin + down + aside * s * face.half_last for s in (-1, 1)])
        x0, y0 = np.clip(np.floor(corners.min(0)).astype(int), 0, (width, height))
        x1, y1 = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, (width, height))
        if x0 >= x1 or y0 >= y1:
            continue
        dx, dy = x_all[:, x0:x1] - np.float32(origin[0]), y_all[y0:y1] - np.float32(origin[1])
        v = dx * np.float32(aside[1] / determinant) - dy * np.float32(aside[0] / determinant)
        q = dy * np.float32(down[0] / determinant) - dx * np.float32(down[1] / determinant)
        half = np.float32(face.half_first) + v * np.float32(face.half_last - face.half_first)
        rows, columns = np.nonzero((v >= 0) & (v < 1) & (np.abs(q) < half))
        if not len(rows):
            continue
        v, u = v[rows, columns], (q[rows, columns] / half[rows, columns] + 1) / 2
        high, wide = face.texture.shape[:2]
        sample = face.texture[np.minimum((v * high).astype(np.intp), high - 1),
                              np.minimum((u * wide).astype(np.intp), wide - 1)]
        solid = sample[:, 3] > 0
        rows, columns, sample = rows[solid] + y0, columns[solid] + x0, sample[solid]
        shade = ambient + (1 - ambient) * max(0.0, float(face.normal @ light))
        rgb[rows, columns] = sample[:, :3] * np.float32(shade)
        part[rows, columns] = sample[:, 3]
    return rgb, (part > 0).astype(np.float32), part

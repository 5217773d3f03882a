"""Drawn vehicles: an identity is a set of textures on an extruded 3-D body.

The idea: a vehicle is a side profile (a polygon of x and z) swept across its width, with a greenhouse that leans in.
Front, bonnet, windscreen, roof, rear window and tail are strips across the width; the sides are two halves, below and
above the waistline; roof loads and mirrors are small boxes. Every strip and side has its own texture, painted once per
identity; a picture projects the faces without perspective and fills them, far to near.

Real fleets are mostly white, black and grey, so colour says little. Look-alikes share type, colour and proportions and
differ in LOCAL cues only. Most cues are large and on sides and roof, because those are seen from front and rear alike.

Axes: x forward, y to the vehicle's left, z up, in units of its length. Yaw 0 faces the camera, 90 degrees shows the
left side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autoreid.data import drawn_body
from autoreid.data import drawn_scene as scene
from autoreid.data.drawn_body import (
    BODY,
    GLASS,
    LIGHTS,
    PROFILES,
    ROOF,
    WHEELS,
    Body,
    Face,
    body_faces,
    box,
    extent,
    paint_faces,
    project,
)
from autoreid.data.drawn_scene import (
    Camera,
    Nuisance,
    Picture,
    colour,
    contrasting,
    pick,
)

HEIGHT, WIDTH = 96, 96
SUPER = 2
PARTS = drawn_body.PARTS
TYPES = {"sedan": 0.34, "hatchback": 0.20, "suv": 0.20, "van": 0.12, "pickup": 0.07, "truck": 0.07}
COLOURS = {"white": 0.27, "black": 0.20, "grey": 0.12, "silver": 0.12, "red": 0.09, "blue": 0.09, "yellow": 0.05,
           "green": 0.06}
SIDE, STRIP = (84, 144), (32, 56)           # rows x columns of the textures of a side and of a strip


@dataclass(frozen=True)
class Vehicle:
    """What stays the same about one vehicle. The fields from `rims` on are LOCAL: look-alikes differ in some."""

    type: str
    colour: str
    width: float
    stretch: float          # length of the body against its height
    tint: float             # brightness of the glass
    rims: tuple[str, str]                           # pattern, colour
    roof: tuple[str, str]                           # what is on it, colour
    roof_mark: tuple[str, str, int] | None          # motif, colour, glyph code
    decal: tuple[str, str, int, float, int] | None  # motif, colour, glyph code, place, side (0 = both)
    stripe: tuple[str, str] | None                  # kind, colour
    panel: tuple[str, str] | None                   # a door, wing or boot of another colour
    skirt: str | None                               # colour of the sills
    bonnet: tuple[str, str, int] | None             # motif, colour, glyph code
    tail: tuple[str, str, int] | None               # the same on boot or rear door
    stickers: tuple[str, ...]                       # colours on the windscreen
    rear_sticker: str | None
    grille: tuple[int, str]                         # bars, colour
    headlights: int                                 # 4 shapes
    plate: str
    mirrors: str
    bumper: str
    spoiler: str | None


def _mark(chance: float) -> Callable:
    def draw(rng: np.random.Generator, vehicle: Vehicle) -> tuple[str, str, int] | None:
        if rng.random() > chance:
            return None
        return str(rng.choice(scene.MOTIFS)), contrasting(rng, vehicle.colour, least=0.6), int(rng.integers(1000))
    return draw


def _draw_roof(rng: np.random.Generator, vehicle: Vehicle) -> tuple[str, str]:
    load = pick(rng, {"none": 0.22, "rails": 0.12, "box": 0.14, "taxi": 0.08, "lights": 0.08, "sunroof": 0.1,
                      "painted": 0.26})
    return load, contrasting(rng, vehicle.colour, least=0.6)


def _draw_decal(rng: np.random.Generator, vehicle: Vehicle) -> tuple[str, str, int, float, int] | None:
    if rng.random() > 0.6:
        return None
    return (str(rng.choice(scene.MOTIFS)), contrasting(rng, vehicle.colour, least=0.6), int(rng.integers(1000)),
            float(rng.choice([0.30, 0.46, 0.60])), 0 if rng.random() < 0.85 else int(rng.choice([-1, 1])))


def _draw_stripe(rng: np.random.Generator, vehicle: Vehicle) -> tuple[str, str] | None:
    if rng.random() > 0.45:
        return None
    return pick(rng, {"band": 0.3, "double": 0.2, "checks": 0.25, "wedge": 0.25}), contrasting(rng, vehicle.colour)


def _draw_panel(rng: np.random.Generator, vehicle: Vehicle) -> tuple[str, str] | None:
    if rng.random() > 0.3:
        return None
    return (pick(rng, {"front_door": 0.3, "rear_door": 0.25, "wings": 0.25, "bonnet": 0.2}),
            contrasting(rng, vehicle.colour))


def _maybe(chance: float) -> Callable:
    def draw(rng: np.random.Generator, vehicle: Vehicle) -> str | None:
        return contrasting(rng, vehicle.colour) if rng.random() < chance else None
    return draw


LOCAL: dict[str, Callable] = {
    "rims": lambda rng, v: (str(rng.choice(["spokes5", "spokes8", "disc", "ring", "cross", "dish"])),
                            str(rng.choice(["silver", "black", "white", "yellow", "red", "blue"]))),
    "roof": _draw_roof, "roof_mark": _mark(0.3), "decal": _draw_decal, "stripe": _draw_stripe, "panel": _draw_panel,
    "skirt": _maybe(0.35), "bonnet": _mark(0.3), "tail": _mark(0.35),
    "stickers": lambda rng, v: tuple(str(c) for c in rng.choice(["yellow", "red", "sky", "white", "green"],
                                                                int(rng.integers(0, 4)))),
    "rear_sticker": lambda rng, v: str(rng.choice(["white", "yellow", "red", "sky"])) if rng.random() < 0.4 else None,
    "grille": lambda rng, v: (int(rng.integers(0, 4)), str(rng.choice(["black", "silver", "red"]))),
    "headlights": lambda rng, v: int(rng.integers(4)),
    "plate": lambda rng, v: str(rng.choice(["white", "yellow", "blue", "green"])),
    "mirrors": lambda rng, v: v.colour if rng.random() < 0.5 else contrasting(rng, v.colour),
    "bumper": lambda rng, v: pick(rng, {"black": 0.35, v.colour: 0.35, "grey": 0.15, "white": 0.15}),
    "spoiler": _maybe(0.25)}
# the quarters (front, left, back, right) from which a cue shows
SEEN_FROM = {"rims": "flbr", "roof": "flbr", "roof_mark": "flbr", "decal": "flbr", "stripe": "flbr", "panel": "flr",
             "skirt": "flbr", "bonnet": "f", "tail": "b", "stickers": "f", "rear_sticker": "b", "grille": "f",
             "headlights": "f", "plate": "fb", "mirrors": "flbr", "bumper": "fb", "spoiler": "lbr"}
LARGE = ("rims", "roof", "decal", "stripe", "skirt", "roof_mark", "panel")


def draw_vehicle(rng: np.random.Generator) -> Vehicle:
    """A new vehicle, all fields drawn."""
    kind, paint = pick(rng, TYPES), pick(rng, COLOURS)
    vehicle = Vehicle(kind, paint, width=rng.uniform(0.38, 0.43), stretch=rng.uniform(0.94, 1.08),
                      tint=rng.uniform(0.10, 0.26), rims=("disc", "silver"), roof=("none", "black"), roof_mark=None,
                      decal=None, stripe=None, panel=None, skirt=None, bonnet=None, tail=None, stickers=(),
                      rear_sticker=None, grille=(0, "black"), headlights=0, plate="white", mirrors=paint,
                      bumper="black", spoiler=None)
    return replace(vehicle, **{name: draw(rng, vehicle) for name, draw in LOCAL.items()})


def differences(a: Vehicle, b: Vehicle) -> set[str]:
    """The LOCAL cues that tell two vehicles apart."""
    return {name for name in LOCAL if _visible_value(a, name) != _visible_value(b, name)}


def _visible_value(vehicle: Vehicle, name: str) -> object:
    value = getattr(vehicle, name)
    if name in ("roof_mark", "bonnet", "tail", "decal") and value:
        place = (value[3],) if name == "decal" else ()
        return (*value[:3], *place) if value[0] == "glyph" else (*value[:2], *place)
    if name == "roof_mark" and vehicle.roof[0] in ("box", "taxi", "lights"):
        return None
    if name == "roof":
        return value[0] if value[0] in ("none", "lights", "sunroof", "rails") else value
    return value


def told_apart(a: Vehicle, b: Vehicle) -> bool:
    """Whether two look-alikes differ in a large cue of sides or roof, which front and rear views both show."""
    telling = differences(a, b) & set(LARGE)
    if "bonnet" in [v.panel[0] for v in (a, b) if v.panel]:
        telling -= {"panel"}        # a bonnet shows from the front only
    return bool(telling)


def draw_group(rng: np.random.Generator, count: int, n_diff: int) -> list[Vehicle]:
    """`count` look-alikes: each member re-draws `n_diff` cues of one base vehicle until all can be told apart."""
    base = draw_vehicle(rng)
    members: list[Vehicle] = []
    while len(members) < count:
        names = [str(n) for n in rng.choice(list(LOCAL), n_diff, replace=False)]
        member = replace(base, **{name: LOCAL[name](rng, base) for name in names})
        if all(told_apart(member, other) for other in members):
            members.append(member)
    return members


def attributes(vehicle: Vehicle) -> dict[str, Any]:
    """The specification as plain JSON values."""
    return asdict(vehicle)


# --- textures ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Painted:
    """A vehicle ready to be painted: its faces with their textures."""

    vehicle: Vehicle
    faces: list[Face]


def dress(vehicle: Vehicle) -> Painted:
    """Build the faces and their textures, once for all pictures."""
    body = PROFILES[vehicle.type]
    strips = {name: _strip_texture(vehicle, name) for name in body.strips}
    sides = {side: _side_texture(vehicle, body, side) for side in (-1, 1)}
    faces = body_faces(body, vehicle.width, vehicle.stretch, strips, sides)
    top, (front, rear) = body.height, body.roof
    middle, half = (front + rear) / 2, vehicle.width * 0.36
    load, ink = vehicle.roof[0], colour(vehicle.roof[1])
    if load == "box":
        faces += box(middle, 0, top + 0.035, (front - rear) * 0.36, half * 0.75, 0.035, ink, ROOF)
    elif load == "taxi":
        faces += box(middle, 0, top + 0.025, 0.035, half * 0.5, 0.025, ink, ROOF)
    elif load == "lights":
        for y, name in ((-0.5, "blue"), (0.5, "red")):
            faces += box(middle, y * half, top + 0.018, 0.03, half * 0.5, 0.018, colour(name), ROOF)
    elif load == "rails":
        for y in (-1, 1):
            faces += box(middle, y * half, top + 0.014, (front - rear) * 0.46, 0.012, 0.012, colour("charcoal"), ROOF)
    if vehicle.spoiler:
        x, z, layer = (rear - 0.01, top, 1) if body.tall_rear else (body.tail_x + 0.02, body.deck, 0)
        faces += box(x, 0, z + 0.03, 0.02, half, 0.012, colour(vehicle.spoiler), ROOF, layer)
    for y in (-1, 1):
        faces += box(front + 0.09, y * (vehicle.width / 2 + 0.015), body.waist + 0.02, 0.016, 0.022, 0.02,
                     colour(vehicle.mirrors), BODY, layer=0)
    return Painted(vehicle, faces)


def _strip_texture(vehicle: Vehicle, name: str) -> np.ndarray:
    """The texture of a strip across the width: row 0 is its upper (or rear) edge, RGB and part number."""
    rows, columns = STRIP
    tex = np.empty((rows, columns, 4), np.float32)
    paint = colour(vehicle.colour)
    tex[..., :3], tex[..., 3] = paint, BODY
    if name in ("windscreen", "rear_window"):
        tex[2:-1, 4:-4, :3], tex[2:-1, 4:-4, 3] = vehicle.tint, GLASS
        if name == "windscreen":
            for k, ink in enumerate(vehicle.stickers):
                tex[5:13, 8 + 15 * k:18 + 15 * k, :3] = colour(ink)
        elif vehicle.rear_sticker:
            tex[8:22, 32:48, :3] = colour(vehicle.rear_sticker)
    elif name == "roof":
        tex[..., 3] = ROOF
        load, ink = vehicle.roof
        if load == "painted":
            tex[..., :3] = colour(ink)
        elif load == "sunroof":
            tex[6:22, 10:-10, :3] = 0.1
        if vehicle.roof_mark:
            motif, ink, code = vehicle.roof_mark
            scene.stamp(tex, motif, code, colour(ink), 0.12, 0.2, 0.76, 0.6)
    elif name == "bonnet":
        if vehicle.panel and vehicle.panel[0] == "bonnet":
            tex[..., :3] = colour(vehicle.panel[1])
        if vehicle.bonnet:
            motif, ink, code = vehicle.bonnet
            scene.stamp(tex, motif, code, colour(ink), 0.15, 0.25, 0.7, 0.5)
    elif name == "front":
        _paint_front(tex, vehicle)
    elif name == "tail":
        tex[3:11, 2:10, :3] = tex[3:11, -10:-2, :3] = (0.7, 0.06, 0.06)
        tex[3:11, 2:10, 3] = tex[3:11, -10:-2, 3] = LIGHTS
        if vehicle.tail:
            motif, ink, code = vehicle.tail
            scene.stamp(tex, motif, code, colour(ink), 0.04, 0.28, 0.5, 0.44)
        tex[20:25, 20:36, :3] = colour(vehicle.plate)
        tex[26:, :, :3] = colour(vehicle.bumper)
    elif name == "bed":
        tex[3:-1, 4:-4, :3] = 0.13
    return tex


def _paint_front(tex: np.ndarray, vehicle: Vehicle) -> None:
    bars, ink = vehicle.grille
    tex[6:18, 15:41, :3] = 0.08
    for k in range(bars):
        tex[7 + 4 * k:9 + 4 * k, 16:40, :3] = colour(ink) if ink != "black" else 0.3
    rows, wide = ((slice(5, 12), 11), (slice(4, 15), 9), (slice(8, 12), 13), (slice(5, 17), 6))[vehicle.headlights]
    for side in (slice(2, 2 + wide), slice(-2 - wide, -2)):
        tex[rows, side, :3] = (0.95, 0.94, 0.82)
        tex[rows, side, 3] = LIGHTS
    tex[21:, :, :3] = colour(vehicle.bumper)
    tex[21:26, 20:36, :3] = colour(vehicle.plate)


def _side_texture(vehicle: Vehicle, body: Body, side: int) -> np.ndarray:
    """The texture of one side as seen in profile, nose to the right on both (the projection mirrors the left one);
    column = x from the tail, row = z from the roof. RGB, part number; part 0 is not body (the air under the sills)."""
    rows, columns = SIDE
    tex = np.empty((rows, columns, 4), np.float32)
    tex[..., :3], tex[..., 3] = colour(vehicle.colour), BODY
    x = (np.arange(columns) + 0.5) / columns * (body.nose_x - body.tail_x) + body.tail_x
    z = body.height * (1 - (np.arange(rows) + 0.5) / rows)
    low = (z < body.waist)[:, None]

    def where(left: float, right: float, bottom: float, top: float) -> tuple[slice, slice]:
        inside_x, inside_z = np.flatnonzero((x > left) & (x < right)), np.flatnonzero((z > bottom) & (z < top))
        if not len(inside_x) or not len(inside_z):
            return slice(0, 0), slice(0, 0)
        return slice(inside_z[0], inside_z[-1] + 1), slice(inside_x[0], inside_x[-1] + 1)

    doors = np.linspace(body.doors[0], body.doors[1], body.door_count + 1)
    if vehicle.panel and vehicle.panel[0] != "bonnet":
        rear = (doors[0], doors[1]) if body.door_count > 1 else (doors[0] - 0.22, doors[0])
        spans = {"front_door": (doors[-2], doors[-1]), "rear_door": rear, "wings": (doors[-1], body.nose_x)}
        tex[where(*spans[vehicle.panel[0]], 0.0, body.waist)][..., :3] = colour(vehicle.panel[1])
    if vehicle.stripe:
        kind, ink = vehicle.stripe
        place = body.waist - 0.045
        if kind == "wedge":
            mask = low & (z[:, None] < 0.07 + 0.14 * (x - body.tail_x)[None, :] ** 1.5 / 1.0)
        elif kind == "double":
            mask = np.abs(np.abs(z - place) - 0.022)[:, None] < 0.011
        else:
            mask = np.abs(z - place)[:, None] < 0.026
        mask = np.broadcast_to(mask, (rows, columns))
        if kind == "checks":
            mask = mask & (((x // 0.035).astype(int)[None, :] + (z // 0.026).astype(int)[:, None]) % 2 == 0)
        tex[mask, :3] = colour(ink)
    tex[where(-1, 1, 0, 0.085)][..., :3] = colour(vehicle.skirt) if vehicle.skirt else colour(vehicle.colour) * 0.7
    if vehicle.decal and vehicle.decal[4] in (0, side):
        motif, ink, code, place, _ = vehicle.decal
        spot = body.decal_z
        high, wide = (spot[1] - spot[0]) / body.height, 0.20
        scene.stamp(tex, motif, code, colour(ink), 1 - spot[1] / body.height, place - wide / 2, high, wide)
    for left, right in body.windows:
        tex[where(left, right, body.waist + 0.012, body.height - 0.025)] = (*[vehicle.tint] * 3, GLASS)
    for door in doors:
        tex[where(door - 0.005, door + 0.005, 0.09, body.waist)][..., :3] *= 0.55
    _paint_wheels(tex, vehicle, body, x, z)
    return tex


def _paint_wheels(tex: np.ndarray, vehicle: Vehicle, body: Body, x: np.ndarray, z: np.ndarray) -> None:
    pattern, ink = vehicle.rims
    for axle in body.axles:
        dx, dz = (x - axle)[None, :], (z - body.wheel)[:, None]
        radius, angle = np.hypot(dx, dz) / body.wheel, np.arctan2(dz, dx)
        tex[radius < 1.22, :3] = 0.05
        tex[radius < 1.22, 3] = WHEELS
        rim = radius < 0.72
        cut = {"spokes5": np.cos(5 * angle) > -0.2, "spokes8": np.cos(8 * angle) > 0, "disc": radius < 0.72,
               "ring": radius > 0.42, "cross": np.cos(4 * angle) > 0.1, "dish": radius < 0.42}[pattern]
        tex[rim, :3] = 0.12
        tex[rim & cut, :3] = colour(ink) if ink != "black" else 0.02
    # air below the sills, but not below the wheels
    under = (z < body.sill)[:, None] & np.ones_like(x, bool)[None, :]
    for axle in body.axles:
        under &= np.hypot((x - axle)[None, :], (z - body.wheel)[:, None]) > body.wheel
    tex[under, 3] = 0


# --- pictures ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Walk:
    """One tracklet: how one vehicle passes one camera."""

    yaw: float
    scale: float
    x: float
    y: float
    exposure: float


def draw_walk(rng: np.random.Generator, camera: Camera, nuisance: Nuisance) -> Walk:
    """A road runs both ways: a camera sees fronts or rears, three-quarter."""
    yaw = camera.yaw + rng.normal() * camera.yaw_spread + (np.pi if rng.random() < 0.5 else 0)
    return Walk(yaw=float(yaw), scale=float(1 + rng.normal() * 0.04 * nuisance.align), x=rng.random(), y=rng.random(),
                exposure=float(rng.normal() * 0.12 * nuisance.jitter))


def shoot(painted: Painted, camera: Camera, walk: Walk, nuisance: Nuisance, rng: np.random.Generator,
          bad_box: bool = False) -> Picture:
    """One frame. As in VeRi the box is resized to a square, here with the aspect changed by 1.5 at most."""
    image = scene.crop(camera, walk.x + rng.normal() * 0.006, walk.y + rng.normal() * 0.04, HEIGHT, WIDTH)
    yaw = walk.yaw + rng.normal() * np.radians(6)
    pitch = camera.pitch + rng.normal() * np.radians(1.5)
    screen, to_camera = project(yaw, pitch)
    low, high = extent(painted.faces, screen)
    scale = np.array((0.90 * WIDTH, 0.84 * HEIGHT)) / (high - low)
    scale = np.minimum(scale, 1.5 * scale[::-1])
    scale = scale * walk.scale * (1 + rng.normal() * 0.03 * nuisance.align) * (1.6 if bad_box else 1)
    shift = rng.normal(size=2) * (4, 3) * nuisance.align
    middle = np.array((WIDTH / 2, HEIGHT * 0.51)) + shift
    offset = middle - (low + high) / 2 * scale
    bottom = middle[1] + (high[1] - low[1]) / 2 * scale[1]
    scene.ground_shadow(image, (middle[0], bottom - 0.10 * HEIGHT), 0.50 * WIDTH, 0.13 * HEIGHT)
    toward, aside = np.array((np.cos(yaw), np.sin(yaw), 0)), np.array((-np.sin(yaw), np.cos(yaw), 0))
    light = 0.55 * (np.cos(camera.lamp) * toward + np.sin(camera.lamp) * aside) + np.array((0, 0, 0.83))
    over, cover, parts = scene.reduce(*paint_faces(
        painted.faces, screen, to_camera, scale * SUPER, offset * SUPER, light, camera.ambient, HEIGHT * SUPER,
        WIDTH * SUPER), SUPER)
    image = image * (1 - cover)[..., None] + over
    mask, parts, hidden = scene.disturb(image, cover > 0.5, parts, nuisance, rng)
    exposure = walk.exposure + rng.normal() * 0.22 * nuisance.jitter
    truth = {"yaw": round(float(np.degrees(yaw)) % 360, 1), "pitch": round(float(np.degrees(pitch)), 1),
             "scale": round(float(walk.scale), 3), "shift_x": round(float(shift[0]), 1),
             "shift_y": round(float(shift[1]), 1), "occluded": round(hidden, 3),
             "visible": "+".join(_visible(painted.vehicle, yaw))}
    return Picture(scene.photograph(image, camera, exposure, rng), mask, parts[::2, ::2], camera.quality, truth)


def _visible(vehicle: Vehicle, yaw: float) -> list[str]:
    """The cues whose side looks at the camera (occlusion is told by the masks)."""
    facing = {"f": np.cos(yaw) > 0.2, "b": np.cos(yaw) < -0.2, "l": np.sin(yaw) > 0.2, "r": np.sin(yaw) < -0.2}
    shown = []
    for name in LOCAL:
        quarters = SEEN_FROM[name]
        if name == "decal" and vehicle.decal and vehicle.decal[4]:
            quarters = "l" if vehicle.decal[4] > 0 else "r"
        if name in ("rims", "decal", "stripe", "skirt"):
            quarters = quarters.replace("f", "").replace("b", "")      # on the sides only
        if getattr(vehicle, name) not in (None, ()) and any(facing[quarter] for quarter in quarters):
            shown.append(name)
    return shown

"""Drawn people: an identity is a set of textures on a walking 3-D figure.

The idea: clothes are painted once per identity on (height, angle) textures of tapered cylinders; a picture turns the
figure by a yaw, poses it by a gait phase and paints about 25 cylinders from far to near. What a camera can see of a
person then follows from geometry: a back hides the logo, a side shows half of it.

Look-alikes share build, skin and clothes, and differ only in LOCAL attributes (logo, bag, shoes, ...), so that only a
model that looks at the parts can tell them apart.

Axes: X to the person's left, Y up, Z forward, in statures (feet at 0, crown at 1). A texture's column is the angle phi
(0 = front, +90 degrees = left); its row runs downwards. Yaw 0 faces the camera; the point phi is at x = sin(phi + yaw).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autoreid.data import drawn_scene as scene
from autoreid.data.drawn_figure import PARTS, TAU, Canvas, paint
from autoreid.data.drawn_scene import (
    Camera,
    Nuisance,
    Picture,
    colour,
    contrasting,
    pick,
)

HEIGHT, WIDTH = 128, 64
SUPER = 2                   # painted at twice the size, then box-reduced
COLUMNS = 128               # of the torso's texture; limbs and head use half

TOPS = ("black", "charcoal", "grey", "white", "cream", "brown", "red", "green", "teal", "blue", "navy", "purple")
BOTTOMS = ("black", "charcoal", "grey", "tan", "olive", "navy", "blue", "white")
SKINS = np.array([(0.94, 0.78, 0.66), (0.86, 0.67, 0.52), (0.72, 0.52, 0.37), (0.52, 0.35, 0.24), (0.32, 0.21, 0.15)],
                 np.float32)
HAIRS = ("black", "brown", "maroon", "tan", "grey", "charcoal")


@dataclass(frozen=True)
class Person:
    """What stays the same about one person. The fields from `logo` on are LOCAL: look-alikes differ in some of them."""

    skin: int
    height: float
    build: float
    leg: float
    top: str
    top2: str
    pattern: str
    frequency: int
    coat: bool
    inner: str | None       # an open jacket over this colour
    bottom: str
    bottom_kind: str
    logo: tuple[str, str, int, str] | None      # motif, colour, glyph code, place
    back: tuple[str, str, int] | None           # motif, colour, glyph code
    bag: tuple[str, str, str, int] | None       # kind, colour, band colour, side (+1 = left)
    shoe: tuple[str, str, str]                  # shoe, sole, sock colours
    hair: tuple[str, str]                       # style, colour
    legs: tuple[str, str]                       # detail, colour
    scarf: str | None
    armband: tuple[str, int] | None             # colour, side
    sleeve: tuple[str, str]                     # long / short, colour
    belt: str | None


def _draw_logo(rng: np.random.Generator, person: Person) -> tuple[str, str, int, str] | None:
    if rng.random() > 0.7:
        return None
    return (str(rng.choice(scene.MOTIFS)), contrasting(rng, person.inner or person.top, person.top2),
            int(rng.integers(1000)), pick(rng, {"middle": 0.4, "left": 0.2, "right": 0.2, "low": 0.2}))


def _draw_back(rng: np.random.Generator, person: Person) -> tuple[str, str, int] | None:
    if rng.random() > 0.6:
        return None
    return str(rng.choice(scene.MOTIFS)), contrasting(rng, person.top, person.top2), int(rng.integers(1000))


def _draw_bag(rng: np.random.Generator, person: Person) -> tuple[str, str, str, int] | None:
    kind = pick(rng, {"none": 0.36, "backpack": 0.26, "shoulder": 0.22, "hand": 0.16})
    if kind == "none":
        return None
    main = contrasting(rng, person.top)
    return kind, main, contrasting(rng, main), int(rng.choice([-1, 1]))


def _draw_shoe(rng: np.random.Generator, person: Person) -> tuple[str, str, str]:
    shoe = str(rng.choice(["black", "white", "red", "blue", "brown", "yellow", "green", "grey", "orange", "pink"]))
    return shoe, str(rng.choice(["black", "white"])), str(rng.choice(["white", "black", "red", "sky"]))


def _draw_hair(rng: np.random.Generator, person: Person) -> tuple[str, str]:
    style = pick(rng, {"short": 0.30, "long": 0.2, "bald": 0.08, "pony": 0.12, "cap": 0.18, "hood": 0.12})
    if style == "cap":
        return style, list(scene.PALETTE)[int(rng.integers(len(scene.PALETTE)))]
    return style, person.top if style == "hood" else str(rng.choice(HAIRS))


def _draw_legs(rng: np.random.Generator, person: Person) -> tuple[str, str]:
    detail = pick(rng, {"plain": 0.3, "stripe": 0.25, "knee": 0.15, "check": 0.15, "cuff": 0.15})
    return detail, contrasting(rng, person.bottom)


def _draw_scarf(rng: np.random.Generator, person: Person) -> str | None:
    return contrasting(rng, person.top) if rng.random() < 0.22 else None


def _draw_armband(rng: np.random.Generator, person: Person) -> tuple[str, int] | None:
    return (contrasting(rng, person.top), int(rng.choice([-1, 1]))) if rng.random() < 0.15 else None


def _draw_sleeve(rng: np.random.Generator, person: Person) -> tuple[str, str]:
    return (pick(rng, {"long": 0.6, "short": 0.4}),
            person.top if rng.random() < 0.6 else contrasting(rng, person.top))


def _draw_belt(rng: np.random.Generator, person: Person) -> str | None:
    return contrasting(rng, person.top, person.bottom) if rng.random() < 0.28 else None


LOCAL: dict[str, Callable] = {
    "logo": _draw_logo, "back": _draw_back, "bag": _draw_bag, "shoe": _draw_shoe, "hair": _draw_hair,
    "legs": _draw_legs, "scarf": _draw_scarf, "armband": _draw_armband, "sleeve": _draw_sleeve, "belt": _draw_belt}
# the quarters (front, left, back, right) from which an attribute can be seen, mirrored views counted as one another
SEEN_FROM = {"logo": "f", "back": "b", "bag": "flbr", "shoe": "flbr", "hair": "flbr", "legs": "flbr", "scarf": "flbr",
             "armband": "fb", "sleeve": "flbr", "belt": "flbr"}


def draw_person(rng: np.random.Generator) -> Person:
    """A new person, all fields drawn."""
    top = str(rng.choice(TOPS))
    coat = rng.random() < 0.12
    person = Person(
        skin=int(rng.integers(len(SKINS))), height=rng.uniform(0.92, 1.04), build=rng.uniform(0.88, 1.18),
        leg=rng.uniform(0.47, 0.52), top=top, top2=contrasting(rng, top),
        pattern=pick(rng, {"plain": 0.44, "hoops": 0.1, "pinstripe": 0.07, "check": 0.08, "plaid": 0.08, "dots": 0.06,
                           "block": 0.08, "yoke": 0.06, "diagonal": 0.03}),
        frequency=int(rng.integers(4, 8)), coat=coat, inner=contrasting(rng, top) if rng.random() < 0.22 else None,
        bottom=str(rng.choice(BOTTOMS)), bottom_kind=pick(rng, {"trousers": 0.62, "shorts": 0.2, "skirt": 0.18}),
        logo=None, back=None, bag=None, shoe=("black",) * 3, hair=("short", "black"), legs=("plain", "black"),
        scarf=None, armband=None, sleeve=("long", top), belt=None)
    return replace(person, **{name: draw(rng, person) for name, draw in LOCAL.items()})


def differences(a: Person, b: Person) -> set[str]:
    """The LOCAL attributes that tell two people apart, leaving out what only a mirror image tells (the side of a bag:
    flip augmentation merges it) and what nobody sees (socks under trousers)."""
    return {name for name in LOCAL if _visible_value(a, name) != _visible_value(b, name)}


def _visible_value(person: Person, name: str) -> object:
    value = getattr(person, name)
    if name == "bag" and value:
        return value[:3]
    if name == "armband" and value:
        return value[0]
    if name == "shoe":
        return value[0] if person.bottom_kind == "trousers" else (value[0], value[2])
    if name == "legs" and value[0] == "plain":
        return "plain"
    if name in ("logo", "back") and value and value[0] != "glyph":
        return (*value[:2], *value[3:])
    if name == "back" and person.bag and person.bag[0] == "backpack":
        return None
    if name == "belt" and person.coat:
        return None
    return value


def told_apart(a: Person, b: Person) -> bool:
    """Whether two look-alikes differ in an attribute that at least two of the four yaws show."""
    seen = [SEEN_FROM[name] for name in differences(a, b)]
    return any(len(quarters) >= 2 for quarters in seen)


def draw_group(rng: np.random.Generator, count: int, n_diff: int) -> list[Person]:
    """`count` look-alikes: one base person; each member re-draws `n_diff` local attributes until all can be told
    apart pairwise."""
    base = draw_person(rng)
    members: list[Person] = []
    while len(members) < count:
        names = [str(n) for n in rng.choice(list(LOCAL), n_diff, replace=False)]
        member = replace(base, height=base.height * rng.uniform(0.99, 1.01), build=base.build * rng.uniform(0.98, 1.02),
                         **{name: LOCAL[name](rng, base) for name in names})
        if all(told_apart(member, other) for other in members):
            members.append(member)
    return members


def attributes(person: Person) -> dict[str, Any]:
    """The specification as plain JSON values."""
    return asdict(person)


# --- textures ---------------------------------------------------------------------------------------------------------

def _cloth(kind: str, first: np.ndarray, second: np.ndarray, frequency: int, rows: int, columns: int) -> np.ndarray:
    """A garment's texture, rows x columns x 3."""
    v = (np.arange(rows, dtype=np.float32)[:, None] + 0.5) / rows
    phi = (np.arange(columns, dtype=np.float32)[None, :] + 0.5) / columns * TAU - np.pi
    a, b = v * frequency, phi / TAU * 2 * frequency
    masks = {
        "plain": lambda: v < 0, "hoops": lambda: a % 1 < 0.45, "pinstripe": lambda: b % 1 < 0.38,
        "check": lambda: (a % 1 < 0.5) ^ (b % 1 < 0.5), "plaid": lambda: (a % 1 < 0.3) | (b % 1 < 0.3),
        "dots": lambda: np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.32, "block": lambda: v > 0.55,
        "yoke": lambda: v < 0.27, "diagonal": lambda: (a + b) % 1 < 0.4}
    mask = np.broadcast_to(masks[kind](), (rows, columns))
    return np.where(mask[..., None], second, first).astype(np.float32)


@dataclass(frozen=True)
class Figure:
    """A person ready to be painted: the specification and the textures by part."""

    person: Person
    textures: dict[str, np.ndarray]


def dress(person: Person) -> Figure:
    """Paint the textures of a person, once for all pictures."""
    skin, top2 = SKINS[person.skin], colour(person.top2)
    tex = {"torso": _torso_texture(person), "head": _head_texture(person), "skin": _flat(skin)}
    sleeve_kind, sleeve_colour = person.sleeve
    for side in (-1, 1):
        same = sleeve_colour == person.top
        cloth = _cloth(person.pattern if same and person.pattern in ("hoops", "check", "plaid", "dots") else "plain",
                       colour(sleeve_colour), top2, max(2, person.frequency // 2), 24, COLUMNS // 2)
        upper, lower = cloth.copy(), cloth.copy()
        if sleeve_kind == "short":
            upper[15:], lower[:] = skin, skin
        if person.armband and person.armband[1] == side:
            upper[7:14] = colour(person.armband[0])
        tex[f"upper{side}"], tex[f"fore{side}"] = upper, lower
        tex[f"thigh{side}"], tex[f"shin{side}"] = _leg_textures(person, side)
    shoe, sole, _ = (colour(c) for c in person.shoe)
    tex["shoe"] = np.broadcast_to(shoe, (12, COLUMNS // 2, 3)).copy()
    tex["sole"] = _flat(sole)
    tex["pelvis"] = _flat(colour(person.bottom))
    if person.bottom_kind == "skirt":
        detail, ink = person.legs
        kind = {"check": "check", "stripe": "pinstripe"}.get(detail, "plain")
        tex["skirt"] = _cloth(kind, colour(person.bottom), colour(ink), 5, 32, COLUMNS // 2)
        if detail in ("cuff", "knee"):
            tex["skirt"][{"cuff": slice(25, 32), "knee": slice(10, 18)}[detail]] = colour(ink)
    if person.bag:
        tex["bag"] = np.broadcast_to(colour(person.bag[1]), (24, COLUMNS // 2, 3)).copy()
        tex["bag"][10:16] = colour(person.bag[2])
    for name, value in (("scarf", person.scarf), ("belt", person.belt)):
        if value:
            tex[name] = _flat(colour(value))
    if person.hair[0] != "bald":
        tex["hair"] = _flat(colour(person.hair[1]))
    return Figure(person, tex)


def _flat(ink: np.ndarray) -> np.ndarray:
    return np.broadcast_to(ink, (2, COLUMNS // 2, 3))


def _torso_texture(person: Person) -> np.ndarray:
    tex = _cloth(person.pattern, colour(person.top), colour(person.top2), person.frequency, 64, COLUMNS)
    middle = COLUMNS // 2
    scale = 0.7 if person.coat else 1.0         # a coat is longer: the same mark takes less of its texture
    if person.inner:
        tex[:, middle - 9:middle + 9] = colour(person.inner)
    if person.logo:
        name, ink, code, place = person.logo
        row = {"middle": 0.20, "left": 0.18, "right": 0.18, "low": 0.55}[place]
        shift = {"left": 0.07, "right": -0.07}.get(place, 0.0)
        size = 0.24 if place in ("left", "right") else 0.36
        scene.stamp(tex, name, code, colour(ink), row * scale, 0.5 + shift - 0.32 * size, size * scale, 0.64 * size)
    if person.back:
        name, ink, code = person.back
        scene.stamp(tex, name, code, colour(ink), 0.2 * scale, 1 - 0.125, 0.4 * scale, 0.25)
    if person.bag and person.bag[0] == "backpack":
        for left in (middle - 15, middle + 9):
            tex[4:round(44 * scale), left:left + 6] = colour(person.bag[1]) * 0.85
    if person.bag and person.bag[0] == "shoulder":
        rows = np.arange(round(58 * scale))
        reach = (rows / rows[-1] - 0.5) * 52 * person.bag[3]
        for column in (middle + reach, -reach):     # across the front, and back the other way behind
            for k in range(-2, 3):
                tex[rows, (column.astype(int) + k) % COLUMNS] = colour(person.bag[2])
    tex[0:3, middle - 12:middle + 12] = SKINS[person.skin]      # the neckline
    return tex


def _head_texture(person: Person) -> np.ndarray:
    skin, (style, ink) = SKINS[person.skin], person.hair
    tex = np.broadcast_to(skin, (32, COLUMNS // 2, 3)).copy()
    middle, hair = COLUMNS // 4, colour(ink)
    face = slice(middle - 11, middle + 11)
    if style != "bald":
        behind = {"short": 20, "cap": 14, "pony": 20, "long": 32, "hood": 32}[style]
        around = tex[:, face].copy()
        tex[:behind] = hair
        brow = {"short": 8, "cap": 12, "pony": 7, "long": 7, "hood": 6}[style]
        tex[brow:, face] = around[brow:]
    for eye in (middle - 5, middle + 4):
        tex[14:16, eye:eye + 2] = 0.12
    tex[23:25, middle - 3:middle + 3] = skin * (0.75, 0.5, 0.5)
    return tex


def _leg_textures(person: Person, side: int) -> tuple[np.ndarray, np.ndarray]:
    skin, cloth, (detail, name) = SKINS[person.skin], colour(person.bottom), person.legs
    ink = colour(name)
    leg = _cloth("check" if detail == "check" else "plain", cloth, ink, 9, 56, COLUMNS // 2)
    if person.bottom_kind == "skirt":
        leg[:] = skin
    else:
        if detail == "stripe":
            outer = COLUMNS // 4 + side * COLUMNS // 8
            leg[:, outer - 5:outer + 5] = ink
        elif detail == "knee":
            leg[24:36, COLUMNS // 4 - 12:COLUMNS // 4 + 12] = ink
        elif detail == "cuff":
            leg[48:] = ink
        if person.bottom_kind == "shorts":
            leg[26:] = skin
            if detail in ("cuff", "knee"):
                leg[19:26] = ink
    if person.bottom_kind != "trousers":
        leg[49:] = colour(person.shoe[2])
    return leg[:28], leg[28:]


# --- pictures ---------------------------------------------------------------------------------------------------------

@functools.cache
def _passers_by() -> tuple[Figure, ...]:
    """A fixed crowd for second persons behind; nobody of it is in any data set."""
    rng = np.random.default_rng(2024)
    return tuple(dress(draw_person(rng)) for _ in range(24))


@dataclass(frozen=True)
class Walk:
    """One tracklet: how one person passes one camera."""

    yaw: float
    scale: float
    stride: float
    x: float        # where on the panorama, in [0, 1]
    y: float
    exposure: float


def draw_walk(rng: np.random.Generator, camera: Camera, nuisance: Nuisance) -> Walk:
    yaw = camera.yaw + rng.normal() * camera.yaw_spread + (np.pi if rng.random() < 0.5 else 0)
    return Walk(yaw=float(yaw), scale=float(1 + rng.normal() * 0.04 * nuisance.align), stride=rng.uniform(0.35, 1),
                x=rng.random(), y=rng.random(), exposure=float(rng.normal() * 0.12 * nuisance.jitter))


def shoot(figure: Figure, camera: Camera, walk: Walk, nuisance: Nuisance, rng: np.random.Generator,
          bad_box: bool = False) -> Picture:
    """One frame of a walk. A bad box is what a failed detector cuts out: a piece of a person, or a far too big box."""
    image = scene.crop(camera, walk.x + rng.normal() * 0.008, walk.y + rng.normal() * 0.05, HEIGHT, WIDTH)
    yaw = walk.yaw + rng.normal() * np.radians(10)
    scale = walk.scale * (1 + rng.normal() * 0.03 * nuisance.align)
    shift = rng.normal(size=2) * (3, 4) * nuisance.align
    phase = rng.uniform(0, TAU)
    if bad_box:
        scale *= rng.choice([0.55, 1.7])
        shift = shift + rng.uniform(14, 26, 2) * rng.choice([-1, 1], 2)
    foot = (WIDTH / 2 + shift[0], 0.955 * HEIGHT + shift[1] + 0.45 * HEIGHT * (scale - 1))
    if rng.random() < nuisance.bystander:
        crowd = _passers_by()
        other = Canvas(HEIGHT * SUPER, WIDTH * SUPER, camera.lamp, camera.ambient)
        aside = rng.uniform(0.3, 0.6) * WIDTH * rng.choice([-1, 1])
        size = rng.uniform(0.7, 0.9)
        paint(other, crowd[int(rng.integers(len(crowd)))], rng.uniform(0, TAU), rng.uniform(0, TAU), 0.7,
              ((foot[0] + aside) * SUPER, (foot[1] - 0.05 * HEIGHT) * SUPER), 0.88 * HEIGHT * SUPER * size,
              camera.pitch)
        over, cover, _ = scene.reduce(other.rgb, other.alpha, other.part, SUPER)
        image = image * (1 - cover)[..., None] + over
    scene.ground_shadow(image, foot, 0.24 * WIDTH * scale, 0.035 * HEIGHT)
    canvas = Canvas(HEIGHT * SUPER, WIDTH * SUPER, camera.lamp, camera.ambient)
    paint(canvas, figure, yaw, phase, walk.stride, (foot[0] * SUPER, foot[1] * SUPER), 0.88 * HEIGHT * SUPER * scale,
          camera.pitch)
    over, cover, parts = scene.reduce(canvas.rgb, canvas.alpha, canvas.part, SUPER)
    image = image * (1 - cover)[..., None] + over
    mask, parts, hidden = scene.disturb(image, cover > 0.5, parts, nuisance, rng)
    exposure = walk.exposure + rng.normal() * 0.22 * nuisance.jitter
    truth = {"yaw": round(float(np.degrees(yaw)) % 360, 1), "phase": round(float(phase), 2),
             "scale": round(float(scale), 3), "shift_x": round(float(shift[0]), 1),
             "shift_y": round(float(shift[1]), 1), "occluded": round(hidden, 3),
             "visible": "+".join(_visible(figure.person, yaw, parts))}
    return Picture(scene.photograph(image, camera, exposure, rng), mask, parts[::2, ::2], camera.quality, truth)


SHOWN_BY = {"logo": "torso", "back": "torso", "bag": "bag", "shoe": "shoes", "hair": "head", "legs": "legs",
            "scarf": "other", "armband": "arms", "sleeve": "arms", "belt": "other"}


def _visible(person: Person, yaw: float, parts: np.ndarray) -> list[str]:
    """The local attributes that this picture shows: their part has 12 pixels or more and they face the camera."""
    count = np.bincount(parts.ravel(), minlength=len(PARTS))
    facing = np.cos(yaw)
    turned = {"logo": facing > 0.35, "back": facing < -0.35}
    if person.armband:
        turned["armband"] = np.sin(np.pi / 2 * person.armband[1] + yaw) > 0.2
    return [name for name in LOCAL if getattr(person, name) is not None and turned.get(name, True)
            and count[PARTS.index(SHOWN_BY[name])] >= 12]

"""Pictures whose identity lies where the test puts it, as a Market-1501 folder."""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 16


def stripe(rng: np.random.Generator, identity: int) -> np.ndarray:
    """Noise everywhere but in the second quarter of the height, whose colour is the identity's."""
    colours = np.random.default_rng(1000 + identity).integers(30, 226, 3)
    image = rng.integers(0, 256, (4, 1, 1, 3)).repeat(HEIGHT // 4, 1).repeat(WIDTH, 2)
    image[1] = colours
    noise = rng.normal(0, 20, (HEIGHT, WIDTH, 3))
    return np.clip(image.reshape(HEIGHT, WIDTH, 3) + noise, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, identity: int) -> np.ndarray:
    """A pattern of 4 x 4 pixels, repeated from a random place on, on a random mean and contrast."""
    tile = np.random.default_rng(2000 + identity).normal(0, 1, (6, 6))
    tile -= tile.mean()
    image = np.tile(tile, (HEIGHT // 6 + 2, WIDTH // 6 + 2))
    y, x = rng.integers(0, 6, 2)
    image = image[y : y + HEIGHT, x : x + WIDTH, None] * rng.uniform(20, 40) + rng.uniform(90, 160, 3)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def whole(rng: np.random.Generator, identity: int) -> np.ndarray:
    """The control of ``stripe``: the identity's colour is in all four quarters."""
    colours = np.random.default_rng(1000 + identity).integers(30, 226, 3)
    return np.clip(colours + rng.normal(0, 20, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def write_market(
    folder: Path, draw, identities: int, cameras: int = 2, frames: int = 4, seed: int = 0, test_identities: int = 0
) -> Path:
    """A Market-1501 folder below ``folder``. Without test identities only ``bounding_box_train``: all that a search
    may open. The first frame of every test identity and camera is its query."""
    rng = np.random.default_rng(seed)
    market = folder / "Market-1501-v15.09.15"

    def save(part: str, identity: int, camera: int, frame: int) -> None:
        (market / part).mkdir(parents=True, exist_ok=True)
        name = f"{identity:04d}_c{camera}s1_{frame:06d}_00.jpg"
        Image.fromarray(draw(rng, identity)).save(market / part / name, quality=95)

    for identity in range(1, identities + test_identities + 1):
        for camera in range(1, cameras + 1):
            for frame in range(frames):
                train = identity <= identities
                save("bounding_box_train" if train else "bounding_box_test" if frame else "query", identity, camera, frame)
    return folder

"""Pictures whose identity lies where the test puts it, in the folders of Market-1501 or VeRi-776."""

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


LAYOUTS = {  # the dataset's folder, its three parts, the name of a file
    "market": ("Market-1501-v15.09.15", ("bounding_box_train", "query", "bounding_box_test"), "{:04d}_c{}s1_{:06d}_00.jpg"),
    "veri": ("VeRi", ("image_train", "image_query", "image_test"), "{:04d}_c{:03d}_{:08d}_0.jpg"),
}


def write_dataset(
    folder: Path, draw, identities: int, cameras: int = 2, frames: int = 4, seed: int = 0, test_identities: int = 0,
    layout: str = "market",
) -> Path:
    """A dataset below ``folder``. Without test identities it has only the training folder: all that a search may open.
    The first frame of every test identity and camera is its query."""
    rng = np.random.default_rng(seed)
    name, (train, query, gallery), pattern = LAYOUTS[layout]
    for identity in range(1, identities + test_identities + 1):
        for camera in range(1, cameras + 1):
            for frame in range(frames):
                part = folder / name / (train if identity <= identities else gallery if frame else query)
                part.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(draw(rng, identity))
                picture.save(part / pattern.format(identity, camera, frame), quality=95)
    return folder

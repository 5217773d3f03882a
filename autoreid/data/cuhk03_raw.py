"""The raw CUHK03 file, ``cuhk-03.mat`` (HDF5): its images as PNG files, once, and its 20 test sets.

``detected`` and ``labeled`` are each five cells, one per pair of cameras: people x 10 images, 1 to 5 by the pair's
first camera and 6 to 10 by its second; some are missing. ``testsets`` are 20 lists of (pair, person). MATLAB's axes come
out of HDF5 reversed. Files are named as every toolkit names them, ``pair_person_view_image.png``, all from 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoreid.data.mat_files import open_hdf5
from autoreid.errors import UserError

NAME = re.compile(r"(?P<pair>\d)_(?P<person>\d{3})_(?P<view>[12])_(?P<image>\d{2})\.png$")
COMPLETE = "extracted.json"  # written last, and says of what


def extracted(mat: str, flavour: str) -> str:
    """The folder of this flavour's images, in the cache; they are extracted the first time (a minute or two)."""
    from autoreid.data.drawn import default_root  # here: it imports the imaging library

    state = os.stat(mat)
    key = hashlib.sha256(f"{os.path.abspath(mat)} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = default_root() / f"cuhk03-{flavour}-{key}"
    if not (folder / COMPLETE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from everybody else
            _extract(mat, flavour, temporary)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def classic_sets(mat: str) -> list[set[tuple[int, int]]]:
    """The (pair, person) of each of the 20 test sets."""
    with open_hdf5(mat) as file, _as_published(mat, "testsets"):
        sets = [file[people][()].T.astype(int).tolist() for people in _cell(file, mat, "testsets").ravel()]
        return [{(pair, person) for pair, person in sets[number]} for number in range(20)]


def _extract(mat: str, flavour: str, folder: Path) -> None:
    from PIL import Image

    from autoreid.runs import progress, say

    say(f"extracting the {flavour} images of {mat} to {folder.parent}, once")
    with open_hdf5(mat) as file:
        with _as_published(mat, flavour):
            pairs = [file[pair][()].T for pair in _cell(file, mat, flavour).ravel()]  # people x 10 references each
            people = sum(len(pair) for pair in pairs)
        for name, pixels in progress(_images(file, mat, pairs), people * 10, f"CUHK03 {flavour}"):
            Image.fromarray(pixels).save(folder / name)
    (folder / COMPLETE).write_text(json.dumps({"of": mat, "boxes": flavour, "people": people}))


@contextmanager
def _as_published(mat: str, name: str) -> Iterator[None]:
    """What is not laid out so (a matrix instead of cells, say) fails in many ways, all with one cure."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OSError) as fault:
        raise UserError(
            f"'{name}' of {mat} is not laid out as in CUHK03's cuhk-03.mat ({type(fault).__name__}); copy the original file"
        ) from fault


def _cell(file: Any, mat: str, name: str) -> Any:
    if name not in file:
        raise UserError(f"{mat} holds no '{name}': it is not CUHK03's cuhk-03.mat; copy the original file")
    return file[name][()]


def _images(file: Any, mat: str, pairs: list[Any]) -> Iterator[tuple[str, Any]]:
    """File name and pixels (H x W x 3, uint8) of each image."""
    for pair, cells in enumerate(pairs, start=1):
        for person, row in enumerate(cells, start=1):
            for image, cell in enumerate(row, start=1):
                name = f"{pair}_{person:03d}_{1 if image <= 5 else 2}_{image:02d}.png"
                with _as_published(mat, f"image {name}"):
                    pixels = file[cell][()].T
                    if pixels.ndim != 3:  # an empty cell is stored as its two sizes
                        continue
                    if pixels.shape[2] != 3 or pixels.dtype != "uint8":
                        raise TypeError("no colour image")
                yield name, pixels.copy()


def _publish(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; where another process was faster, take its folder instead."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / COMPLETE).is_file():
            raise

"""Picture files as uint8 arrays of one size, decoded once and kept: in memory, or in a file that later runs map again.

Decoding and resizing a JPEG costs ten times what augmenting it does, and gives the same pixels every epoch. A cache file
holds a header, a checksum per picture and the pixels. A picture counts only if its checksum fits the pixels that are
there, so one that was half written (a kill, a power cut, another process at the same picture) or damaged since is
decoded again, and nothing but the file's creation needs a lock. Its name says which files, as they were, at which size.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from autoreid.data import Sample
from autoreid.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow says of bad files
PAGE = 4096


def files_of(sample: Sample) -> tuple[str, ...]:
    """The picture files of a sample: a tracklet's frames, or the one picture."""
    return tuple(getattr(sample, "frames", ())) or (sample.path,)


def load_image(path: str, size: tuple[int, int]) -> Tensor:
    """One image as 3 x H x W uint8, RGB, resized to size = (H, W). Raises UserError for a file that cannot be read."""
    return torch.from_numpy(_decode(path, size))


def load_images(samples: Sequence[Sample], size: tuple[int, int]) -> Tensor:
    """The images of the samples as one B x 3 x H x W uint8 batch, for evaluation."""
    images = np.empty((len(samples), 3, *size), np.uint8)

    def fill(i: int) -> None:
        images[i] = _decode(samples[i].path, size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter
        list(pool.map(fill, range(len(samples))))
    return torch.from_numpy(images)


def readable(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """The samples whose pictures can all be decoded, and the paths of those that cannot.

    A tracklet loses its unreadable frames; it is left out when none remains.
    """
    paths = list(dict.fromkeys(path for sample in samples for path in files_of(sample)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        good = dict(zip(paths, pool.map(_readable, paths), strict=True))
    kept = []
    for sample in samples:
        frames = tuple(path for path in files_of(sample) if good[path])
        if len(frames) == len(files_of(sample)):
            kept.append(sample)
        elif frames:
            kept.append(sample._replace(path=frames[0], frames=frames))
    return kept, [path for path in paths if not good[path]]


def _readable(path: str) -> bool:
    try:
        with Image.open(path) as image:
            image.load()  # the header alone would hide a truncated file
    except UNREADABLE:
        return False
    return True


def _decode(path: str, size: tuple[int, int]) -> np.ndarray:
    """3 x H x W uint8."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except UNREADABLE as error:
        raise UserError(
            f"image {path} is truncated or unreadable; copy it again or delete it, and "
            "run `autoreid data NAME --root DIR` to list all unreadable files"
        ) from error
    return np.asarray(resized).transpose(2, 0, 1).copy()


def _missing(path: str) -> UserError:
    return UserError(f"no image {path}; the dataset changed or moved: check it with `autoreid data NAME --root DIR`")


class Pictures:
    """Picture files by number, as 3 x H x W uint8.

    ``cache`` is a folder for a cache file, shared by every run and process that gives the same one. Without it they stay
    in memory where all of them fit in ``cache_bytes``, and else are decoded each time. Forked workers share what is
    kept; spawned ones share a file only.
    """

    def __init__(
        self, paths: Sequence[str], size: tuple[int, int], cache: str | Path | None = None, cache_bytes: int = 1 << 30
    ) -> None:
        self.paths, self.size = list(paths), size
        self._folder = Path(cache).expanduser() if cache is not None else None
        self._kept = self._folder is not None or len(self.paths) * 3 * math.prod(size) <= cache_bytes
        self._open()

    def _open(self) -> None:
        self._store: _Store | None = None
        if self._kept and self.paths:
            count = len(self.paths)
            self._store = _in_file(self._folder, self.paths, self.size) if self._folder else _in_memory(count, self.size)
            self._seen = _shared(count)  # 1: known to be there, so its checksum is computed once

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_store", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The pictures of these numbers, not to be written to. Raises UserError for a file that cannot be read."""
        distinct = list(dict.fromkeys(int(n) for n in numbers))
        new = [n for n in distinct if self._store is None or not self._seen[n]]
        threads = min(torch.get_num_threads(), len(new))  # 1 in a worker process
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                found = dict(zip(new, pool.map(self._find, new), strict=True))
        else:
            found = {n: self._find(n) for n in new}
        if self._store is not None:
            found = {n: self._store.pixels[n] for n in distinct}
        for picture in found.values():
            picture.flags.writeable = False
        return [found[int(n)] for n in numbers]

    def _find(self, n: int) -> np.ndarray:
        """Picture n, from its file unless it is kept already; then it is."""
        if self._store is None:
            return _decode(self.paths[n], self.size)
        pixels, sums = self._store
        if not sums[n] or sums[n] != _checksum(pixels[n]):
            pixels[n] = _decode(self.paths[n], self.size)
            sums[n] = _checksum(pixels[n])
        self._seen[n] = 1
        return pixels[n]


class _Store(NamedTuple):
    pixels: np.ndarray  # N x 3 x H x W uint8
    sums: np.ndarray  # N uint64, 0 where there is no picture yet


def _checksum(picture: np.ndarray) -> int:
    return zlib.crc32(picture.data) | 1 << 32  # never 0


def _shared(count: int) -> np.ndarray:
    """Zeros that forked workers share; a page takes memory once it is written."""
    return np.frombuffer(mmap.mmap(-1, count), np.uint8)


def _in_memory(count: int, size: tuple[int, int]) -> _Store:
    pixels = _shared(count * 3 * math.prod(size)).reshape(count, 3, *size)
    return _Store(pixels, _shared(8 * count).view(np.uint64))


def _in_file(folder: Path, paths: Sequence[str], size: tuple[int, int]) -> _Store:
    """The cache file of these files as they are now, made if it is not there or not what its name says."""
    key = _key(paths, size)
    shape = (len(paths), 3, *size)
    header = f"autoreid pictures {key} {shape}\n".encode().ljust(PAGE)
    start = PAGE + math.ceil(8 * len(paths) / PAGE) * PAGE  # of the pixels
    file = folder / f"{key}-{size[0]}x{size[1]}.pictures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            wait_for_lock(lock)  # until the block ends, or the process
            if not _is_whole(file, header, start + math.prod(shape)):
                _create(file, header, start + math.prod(shape))
        pixels = np.memmap(file, np.uint8, "r+", start, shape)
        sums = np.memmap(file, np.uint64, "r+", PAGE, (len(paths),))
        return _Store(np.asarray(pixels), np.asarray(sums))  # slices of a memmap are slower to make
    except OSError as error:
        raise UserError(
            f"cache folder {folder} cannot be used: {error.strerror or error}; give --cache a folder that can be written, "
            "or leave it out"
        ) from error


def wait_for_lock(file: IO[str]) -> None:
    """Wait until no other process has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # tries for ten seconds


def _key(paths: Sequence[str], size: tuple[int, int]) -> str:
    """Stands for the files, their sizes and times of change, the pictures' size, and who decodes them."""
    key = hashlib.sha256(f"1 {PIL.__version__} {size}".encode())
    for path in paths:
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise _missing(path) from error
        key.update(b"\0" + os.fsencode(os.path.abspath(path)) + f"\0{found.st_size} {found.st_mtime_ns}".encode())
    return key.hexdigest()[:16]


def _is_whole(file: Path, header: bytes, length: int) -> bool:
    if not file.exists() or file.stat().st_size != length:
        return False
    with open(file, "rb") as opened:
        return opened.read(PAGE) == header


def _create(file: Path, header: bytes, length: int) -> None:
    """An empty cache with all its space reserved: a full disk met while writing to a mapped file ends the process."""
    file.unlink(missing_ok=True)  # not overwritten: another process may still read it
    free = shutil.disk_usage(file.parent).free
    if free < length:
        raise UserError(
            f"the picture cache takes {length / 1e9:.2f} GB and {file.parent} has {free / 1e9:.2f} GB free; make room, "
            "give --cache another folder, or leave it out"
        )
    with open(file, "xb") as opened:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, length)
            else:  # macOS
                os.ftruncate(opened.fileno(), length)
            opened.write(header)  # last: without it this is no cache
        except OSError:
            file.unlink()
            raise

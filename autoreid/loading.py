"""Samples to batches: who trains together (P x K), what the images look like, and which identities the alphas see.

P identities x K images: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss" (2017). Random erasing: Zhong et al.
(AAAI 2020). The search split by images is Auto-ReID's (Quan et al., ICCV 2019, sec. 4.2); by identities it is the one
that resembles the test, where nobody was seen in training.

Nothing here has state that matters: the order, crop, flip and erasing of an image are functions of (seed, epoch,
batch, position). So a run that is resumed at any batch sees what it would have seen, with any number of workers, and
the global random generators are left alone.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from autoreid.data import Sample
from autoreid.errors import UserError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLITS = ("identity", "image")


def split_for_search(
    samples: Sequence[Sample], how: str = "identity", seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Training samples in two: one for the weights, one for the alphas; the same for the same samples and seed.

    ``identity``: a random half of the identities each (the odd one trains), so the alphas are judged on people the
    weights never saw. ``image``: a random half of each identity's images each (Auto-ReID); a single image trains.
    """
    if how not in SPLITS:
        raise unknown("search split", how, SPLITS)
    rng = np.random.default_rng([seed, SPLITS.index(how)])
    of_identity = _by_identity([s.identity for s in samples])
    if how == "identity":
        if len(of_identity) < 2:
            raise UserError(
                f"a split by identity needs at least 2 identities, got {len(of_identity)}; "
                "use more training images or the split by image"
            )
        identities = rng.permutation(sorted(of_identity))
        seen = {int(i) for i in identities[: math.ceil(len(identities) / 2)]}
        trains = [s.identity in seen for s in samples]
    else:
        chosen: set[int] = set()
        for identity in sorted(of_identity):
            # By path, not by place in the list: the halves depend on the images alone.
            indices = sorted(of_identity[identity], key=lambda i: samples[i].path)
            chosen.update(indices[i] for i in rng.permutation(len(indices))[: math.ceil(len(indices) / 2)])
        trains = [i in chosen for i in range(len(samples))]
    return (
        [s for s, train in zip(samples, trains, strict=True) if train],
        [s for s, train in zip(samples, trains, strict=True) if not train],
    )


def relabel(samples: Sequence[Sample]) -> tuple[list[int], int]:
    """Class labels 0 .. C-1 in the order of the identities' numbers, and C."""
    label = {identity: i for i, identity in enumerate(sorted({s.identity for s in samples}))}
    return [label[s.identity] for s in samples], len(label)


class PKSampler:
    """Batches of P identities with K images each, dealt like cards: everyone once before anyone comes again.

    An epoch has ceil(images / (P K)) batches. A batch's P identities are distinct; an identity's images go round in
    shuffled order, and one with fewer than K images gives all of them and repeats some.
    """

    def __init__(
        self, labels: Sequence[int], identities_per_batch: int, images_per_identity: int, seed: int = 0
    ) -> None:
        self.p, self.k, self.seed = identities_per_batch, images_per_identity, seed
        self._images = _by_identity(labels)
        self._batches = max(1, math.ceil(len(labels) / max(1, self.p * self.k)))
        if self.p < 1 or self.k < 1:
            raise UserError(f"a batch is P x K images with P and K at least 1, got {self.p} x {self.k}")
        if len(self._images) < self.p:
            raise UserError(
                f"a batch of {self.p} identities x {self.k} images needs {self.p} identities, but there are only "
                f"{len(self._images)}; lower identities to at most {len(self._images)}"
            )

    def __len__(self) -> int:
        return self._batches

    def batches(self, epoch: int) -> list[list[int]]:
        """The epoch's batches as lists of sample indices, K after K: a function of (seed, epoch) alone."""
        rng = np.random.default_rng([self.seed, epoch])
        labels = _Deck(sorted(self._images), rng)
        images = {label: _Deck(self._images[label], rng) for label in sorted(self._images)}
        return [
            [index for label in labels.deal(self.p) for index in images[label].deal(self.k)]
            for _ in range(self._batches)
        ]


class _Deck:
    """Cards dealt without repeats until all are out, then shuffled anew; a hand repeats a card only if it must."""

    def __init__(self, cards: list[int], rng: np.random.Generator) -> None:
        self.cards, self.rng = cards, rng
        self.left: list[int] = []

    def deal(self, count: int) -> list[int]:
        if count > len(self.cards):  # the whole deck, and the rest with replacement
            repeats = self.rng.integers(len(self.cards), size=count - len(self.cards))
            return self.cards + [self.cards[i] for i in repeats]
        hand, self.left = self.left[:count], self.left[count:]
        if len(hand) < count:
            fresh = [self.cards[i] for i in self.rng.permutation(len(self.cards))]
            held, missing = set(hand), count - len(hand)
            drawn = [card for card in fresh if card not in held][:missing]
            hand, self.left = hand + drawn, [card for card in fresh if card not in set(drawn)]
        return hand


def _by_identity(identities: Sequence[int]) -> dict[int, list[int]]:
    """The indices of each identity's samples, ascending."""
    indices: dict[int, list[int]] = {}
    for i, identity in enumerate(identities):
        indices.setdefault(int(identity), []).append(i)
    return indices


@dataclass(frozen=True)
class Augment:
    """Chance of a mirror image; pixels of black padding before a random crop; chance that a box is erased to the mean.

    ``pad`` counts pixels of the network's input. ``enlarge`` 1.125 reads pictures an eighth larger than the input, from
    which the crop is taken (DaRe). Without either nothing is cropped.
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    enlarge: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment {name} is a probability in [0, 1], got {getattr(self, name)}")
        if self.pad < 0:
            raise UserError(f"augment pad is a number of pixels, 0 or more, got {self.pad}")
        if not 1 <= self.enlarge <= 4:
            raise UserError(f"augment enlarge is a factor from 1 to 4, got {self.enlarge}")


def enlarged(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, in whole pixels."""
    return round(size[0] * factor), round(size[1] * factor)


def load_image(path: str, size: tuple[int, int]) -> Tensor:
    """One image as 3 x H x W uint8, RGB, resized to size = (H, W). Raises UserError for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise UserError(
            f"no image {path}; the dataset changed or moved: check it with `autoreid data NAME --root DIR`"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"image {path} is truncated or unreadable; copy it again or delete it, and "
            "run `autoreid data NAME --root DIR` to list all unreadable files"
        ) from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def load_images(samples: Sequence[Sample], size: tuple[int, int]) -> Tensor:
    """The images of the samples as one B x 3 x H x W uint8 batch, for evaluation."""
    with torch.inference_mode(False):  # the caller's inference mode does not reach the threads that write here
        images = torch.empty(len(samples), 3, *size, dtype=torch.uint8)

    def fill(i: int) -> None:
        images[i] = load_image(samples[i].path, size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter
        list(pool.map(fill, range(len(samples))))
    return images


def normalise(images: Tensor) -> Tensor:
    """B x 3 x H x W uint8 to float32 with ImageNet's mean and deviation, on the images' device."""
    scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(scaled, list(IMAGENET_MEAN), list(IMAGENET_STD))


class _Key(NamedTuple):
    """What names a batch, whoever makes it."""

    epoch: int
    batch: int
    indices: list[int]


class _Batches(Dataset):
    """A batch from its key: decoding, cache, augmentation. Runs in the caller or in a worker, with the same result."""

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Sequence[int],
        size: tuple[int, int],
        augment: Augment,
        seed: int,
        cache_bytes: int,
    ) -> None:
        self.samples, self.labels, self.seed = list(samples), list(labels), seed
        self.size = enlarged(size, augment.enlarge)  # of the pictures that are read
        geometry: list[Any] = [v2.RandomHorizontalFlip(augment.flip)] if augment.flip else []
        geometry += [v2.RandomCrop(size, padding=augment.pad)] if augment.pad or self.size != size else []
        self.geometry = v2.Compose(geometry) if geometry else None
        # After normalisation 0 is the mean colour.
        self.erase = (
            v2.RandomErasing(augment.erase, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=0, inplace=True)
            if augment.erase
            else None
        )
        self.cached = len(self.samples) * 3 * self.size[0] * self.size[1] <= cache_bytes
        self._open_cache()

    def _open_cache(self) -> None:
        """Anonymous memory: pages count once written, forked workers fill and read the same ones."""
        self.cache: Tensor | None = None
        self.filled: Tensor | None = None
        if self.cached and self.samples:
            shape = (len(self.samples), 3, *self.size)
            self.cache = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
            self.filled = torch.frombuffer(mmap.mmap(-1, len(self.samples)), dtype=torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("cache", "filled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_cache()  # a spawned worker cannot share pages and keeps its own

    def _image(self, i: int) -> Tensor:
        if self.cache is None or self.filled is None:
            return load_image(self.samples[i].path, self.size)
        if not self.filled[i]:
            self.cache[i] = load_image(self.samples[i].path, self.size)
            self.filled[i] = 1  # after the pixels: another worker may be looking
        return self.cache[i]

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor] | UserError:
        try:
            images = [self._image(i) for i in key.indices]
        except UserError as error:
            return error  # raised in a worker it would come back wrapped in the worker's traceback
        seeds = np.random.SeedSequence([self.seed, key.epoch, key.batch]).generate_state(2 * len(images), np.uint64)
        with torch.random.fork_rng(devices=[]):
            if self.geometry is not None:
                for position, image in enumerate(images):
                    torch.default_generator.manual_seed(int(seeds[2 * position]))
                    images[position] = self.geometry(image)
            batch = normalise(torch.stack(images))
            if self.erase is not None:
                for position, image in enumerate(batch):
                    torch.default_generator.manual_seed(int(seeds[2 * position + 1]))
                    self.erase(image)  # in place
        return batch, torch.tensor([self.labels[i] for i in key.indices], dtype=torch.int64)


class _Keys(Sampler):
    """The keys of the epoch under way, for the workers. It must not know the loader: in a cycle of references the
    workers would be ended by the garbage collector, which takes five seconds each."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class TrainLoader:
    """Augmented training batches: images B x 3 x H x W float32 normalised, labels B int64.

    ``sampler`` is anything with ``batches(epoch) -> list[list[int]]``. Decoded and resized images stay in memory as
    uint8 where all of them fit in ``cache_bytes``. ``workers`` processes prepare batches ahead; 0 prepares in place.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Sequence[int],
        size: tuple[int, int],
        sampler: Any,
        augment: Augment = Augment(),
        seed: int = 0,
        workers: int = 0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if len(samples) != len(labels):
            raise ValueError(f"one label per sample: got {len(samples)} samples and {len(labels)} labels")
        self.sampler, self.workers = sampler, workers
        self._dataset = _Batches(samples, labels, size, augment, seed, cache_bytes)
        self._keys = _Keys()
        self._ahead: DataLoader | None = None

    def __len__(self) -> int:
        return len(self.sampler) if hasattr(self.sampler, "__len__") else len(self.sampler.batches(0))

    def epoch(self, e: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch e from batch ``start`` on: the same batches as a whole epoch gives from there."""
        batches = self.sampler.batches(e)
        self._keys.keys = [_Key(e, b, batches[b]) for b in range(start, len(batches))]
        made = self._prepared_ahead() if self.workers else map(self._dataset.__getitem__, self._keys.keys)
        fault = None
        for batch in made:
            if isinstance(batch, UserError):
                fault = batch
                break
            yield batch
        if fault is not None:
            # End the workers now: a traceback holds this frame, and the garbage collector waits seconds for each.
            del made
            self._ahead = None
            raise fault

    def _prepared_ahead(self) -> DataLoader:
        """The worker processes, started once and kept from epoch to epoch."""
        if self._ahead is None:
            self._ahead = DataLoader(
                self._dataset,
                sampler=self._keys,
                batch_size=None,
                num_workers=self.workers,
                persistent_workers=True,
                generator=torch.Generator(),  # its own, or each epoch would draw from the global one
            )
        return self._ahead

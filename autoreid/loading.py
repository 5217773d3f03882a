"""Samples to batches: who trains together (P x K), who prepares the batches, and which identities the alphas see.

P identities x K images: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss" (2017). The search split by images is
Auto-ReID's (Quan et al., ICCV 2019, sec. 4.2); by identities it is the one that resembles the test, where nobody was
seen in training. Pictures come from ``autoreid.pictures``, what happens to them is ``autoreid.augment``.

Nothing here has state that matters: the order, frame, crop and all that happens to an image are functions of (seed,
epoch, batch, position). So a run that is resumed at any batch sees what it would have seen, with any number of workers;
the processes of a data-parallel training each see their part of the batches that one process would; and the global random
generators are left alone.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from autoreid.augment import (
    FRAME,
    IMAGENET_MEAN,
    IMAGENET_STD,
    USUAL,
    Augment,
    change,
    crop,
    enlarged,
    finish,
    make_patches,
    make_plan,
    normalise,
    random_numbers,
)
from autoreid.data import Sample
from autoreid.errors import UserError, unknown
from autoreid.options import require
from autoreid.pictures import Pictures, files_of, load_image, load_images, readable

# What callers find here, wherever it is written.
__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "SPLITS", "Augment", "PKSampler", "TrainLoader", "enlarged", "finish", "load_image",
    "load_images", "normalise", "readable", "relabel", "split_for_search",
]

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
            there = len(self._images)
            raise UserError(
                f"a batch of {self.p} identities x {self.k} images needs {self.p} identities, but there are only {there}; "
                f"lower identities to at most {there}, as in --set identities={there}"
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


class _Key(NamedTuple):
    """What names a batch, whoever makes it."""

    epoch: int
    batch: int
    indices: list[int]


class _Batches(Dataset):
    """This process's part of a batch from its key: pictures, augmentation. Runs in the caller or in a worker, with the
    same result."""

    def __init__(
        self,
        pictures: Pictures,
        files: Sequence[int],
        labels: Sequence[int],
        size: tuple[int, int],
        augment: Augment,
        seed: int,
        raw: bool,
        rank: int,
        processes: int,
    ) -> None:
        self.pictures, self.size, self.augment, self.seed, self.raw = pictures, size, augment, seed, raw
        self.rank, self.processes = rank, processes
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.files = np.array(files, np.int64)  # how many each sample has; the pictures are theirs in order
        self.first = np.cumsum(self.files) - self.files

    def __getitem__(self, key: _Key) -> tuple[Tensor, ...] | UserError:
        augment, count = self.augment, len(key.indices)
        part = slice(self.rank * count // self.processes, (self.rank + 1) * count // self.processes)
        drawn = partial(random_numbers, self.seed, key.epoch, key.batch, count)
        numbers = drawn()
        frame = (numbers[:, FRAME] * self.files[key.indices]).astype(np.int64)  # of a tracklet; else 0
        wanted = (self.first[key.indices] + frame).tolist()  # also of the other processes: a patch may come from there
        patches = make_patches(augment.patch, drawn("patch"), part, self.pictures.size, self.size) if augment.patch else []
        try:
            pictures = self.pictures.read([*wanted[part], *(wanted[patch.donor] for patch in patches)])
        except UserError as error:
            return error  # raised in a worker it would come back wrapped in the worker's traceback
        mine = part.stop - part.start
        plan = make_plan(augment, numbers[part], self.pictures.size, self.size)
        images, boxes = crop(pictures[:mine], plan, self.size), torch.from_numpy(plan.boxes)
        change(images, augment, lambda of: drawn(of)[part], patches, pictures[mine:])
        labels = self.labels[key.indices[part]]
        return (images, boxes, labels) if self.raw else (finish(images, boxes), labels)


class _Keys(Sampler):
    """The keys of the epoch under way, for the workers. It must not know the loader: in a cycle of references the
    workers would be ended by the garbage collector, which takes five seconds each."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """A process started within the block has SIGTERM blocked from its first instruction on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where there is no such signal
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_the_parent_says(worker: int) -> None:
    """A SIGTERM to a group of processes reaches the loader's too, twice where a launcher passes it on; but the training
    still needs their batches to stop in good order. So only the parent's own, to one that hangs, ends them."""
    if hasattr(signal, "sigwaitinfo"):  # elsewhere it stays blocked

        def wait() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        threading.Thread(target=wait, daemon=True).start()


class TrainLoader:
    """Augmented training batches: images B x 3 x H x W float32 normalised, labels B int64.

    ``raw``: images uint8, boxes B x 4 and labels, for ``finish(images.to(device), boxes)`` to normalise and erase where
    the network is; a quarter of the bytes, and the same values. ``sampler`` is anything with ``batches(epoch) ->
    list[list[int]]``. Decoded and resized images are kept in a file in the folder ``cache``, or else in memory where all
    of them fit in ``cache_bytes``. ``workers`` processes prepare batches ahead; 0 prepares in place. Of a sample with
    ``frames`` each draw shows one, chosen at random.

    Of ``processes`` that train together, the one of this ``rank`` gets its share of the identities of every batch, in
    order: the ranks' batches one after another are the batch of a single process. ``sampler`` is a PKSampler then.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Sequence[int],
        size: tuple[int, int],
        sampler: Any,
        augment: Augment = USUAL,
        seed: int = 0,
        workers: int = 0,
        cache_bytes: int = 1 << 30,
        cache: str | Path | None = None,
        raw: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if processes > 1:
            enough = math.ceil(sampler.p / processes) * processes
            require(sampler.p == enough, "identities", sampler.p, f"a multiple of {processes}, the number of processes, as "
                    f"each trains on whole identities: set identities={enough}")
        if len(samples) != len(labels):
            raise ValueError(f"one label per sample: got {len(samples)} samples and {len(labels)} labels")
        self.sampler, self.workers = sampler, workers
        files = [files_of(sample) for sample in samples]
        pictures = Pictures([f for of in files for f in of], enlarged(size, augment.enlarge), cache, cache_bytes)
        self._dataset = _Batches(
            pictures, [len(of) for of in files], labels, size, augment, seed, raw, rank, processes
        )
        self._keys = _Keys()
        self._ahead: DataLoader | None = None

    def __len__(self) -> int:
        return len(self.sampler) if hasattr(self.sampler, "__len__") else len(self.sampler.batches(0))

    def epoch(self, e: int, start: int = 0) -> Iterator[Any]:
        """Epoch e from batch ``start`` on: the same batches as a whole epoch gives from there."""
        batches = self.sampler.batches(e)
        self._keys.keys = [_Key(e, b, batches[b]) for b in range(start, len(batches))]
        made: Iterator[Any]
        if self.workers:
            with _sigterm_blocked():  # the workers start here
                made = iter(self._prepared_ahead())
        else:
            made = map(self._dataset.__getitem__, self._keys.keys)
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
                worker_init_fn=_end_when_the_parent_says,
                generator=torch.Generator(),  # its own, or each epoch would draw from the global one
            )
        return self._ahead

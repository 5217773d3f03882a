"""Loading: the search split, the P x K sampler, batches that depend on nothing but their name, pictures kept in a file."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time
from collections import Counter, namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import reference
import reference_loading
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

import autoreid.loading
import autoreid.pictures
from autoreid import augment
from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    PKSampler,
    TrainLoader,
    finish,
    load_image,
    load_images,
    normalise,
    readable,
    relabel,
    split_for_search,
)
from autoreid.pictures import Pictures
from autoreid.recipe import Recipe

Tracklet = namedtuple("Tracklet", "path identity camera frames")
SIZE = (32, 16)
STILL = Augment(flip=0, pad=0, erase=0)
ALL = Augment(0.5, 4, 0.5, 1.25, jitter=0.5, auto_augment="autoaugment", patch=0.7)


def samples_of(counts) -> list[Sample]:
    return [Sample(f"/{i:04d}_{n}.jpg", i, n % 3) for i, count in counts.items() for n in range(count)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Sample]:
    """Six identities with four noisy pictures each, as JPEG of 24 x 12."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    samples = samples_of(dict.fromkeys(range(1, 7), 4))
    samples = [s._replace(path=str(folder) + s.path) for s in samples]
    for sample in samples:
        Image.fromarray(rng.integers(0, 255, (24, 12, 3), dtype=np.uint8)).save(sample.path)
    return samples


PADDED = Augment(pad=4)


def loader(samples, augment=PADDED, workers=0, seed=3, **options) -> TrainLoader:
    labels, _ = relabel(samples)
    return TrainLoader(samples, labels, SIZE, PKSampler(labels, 3, 2, seed), augment, seed, workers, **options)


def same(a, b) -> bool:
    a, b = list(a), list(b)
    if len(a) != len(b):
        return False
    return all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))


def said(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- the search split


def test_split_by_identity_is_disjoint_and_halves():
    samples = samples_of({i: 1 + i % 4 for i in range(1, 12)})
    train, val = split_for_search(samples, "identity", seed=1)
    identities = [{s.identity for s in part} for part in (train, val)]
    assert not identities[0] & identities[1]
    assert [len(i) for i in identities] == [6, 5]
    assert sorted(train + val) == sorted(samples)
    assert split_for_search(samples, "identity", seed=1) == (train, val)
    assert split_for_search(samples, "identity", seed=2) != (train, val)


def test_split_by_image_halves_each_identity_and_trains_on_single_images():
    counts = {1: 1, 2: 2, 3: 5, 4: 8}
    samples = samples_of(counts)
    train, val = split_for_search(samples, "image", seed=1)
    for identity, (trains, judges) in {1: (1, 0), 2: (1, 1), 3: (3, 2), 4: (4, 4)}.items():
        assert sum(s.identity == identity for s in train) == trains
        assert sum(s.identity == identity for s in val) == judges
    assert sorted(train + val) == sorted(samples)
    assert split_for_search(samples, "image", seed=1) == (train, val)
    shuffled = split_for_search(samples[::-1], "image", seed=1)
    assert [sorted(part) for part in shuffled] == [sorted(train), sorted(val)]


def test_split_mistakes():
    assert said(split_for_search, [], "images") == (
        "unknown search split 'images'; did you mean 'image'? known: identity, image"
    )
    assert said(split_for_search, samples_of({1: 5})) == (
        "a split by identity needs at least 2 identities, got 1; use more training images or the split by image"
    )


def test_labels_follow_the_numbers_of_the_identities():
    assert relabel([Sample("a", 9, 0), Sample("b", 2, 0), Sample("c", 9, 1), Sample("d", 5, 0)]) == ([2, 0, 2, 1], 3)


# ------------------------------------------------------------------------------------------------------- P x K


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=12),
    p=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_batches_have_the_properties_of_p_by_k(counts, p, k, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    sampler = PKSampler(labels, p, k, seed)
    for epoch in (0, 7):
        batches = sampler.batches(epoch)
        assert reference.pk_faults(batches, labels, p, k) == []
        assert len(sampler) == len(batches)
        assert PKSampler(labels, p, k, seed).batches(epoch) == batches  # no state


def test_everyone_comes_once_before_anyone_comes_again():
    labels = np.repeat(np.arange(10), 8).tolist()
    batches = PKSampler(labels, 4, 2, seed=0).batches(0)
    order = [labels[batch[i]] for batch in batches for i in range(0, 8, 2)]
    assert sorted(order[:10]) == list(range(10))
    assert sorted(index for batch in batches for index in batch) == list(range(80))  # an epoch sees every image
    assert batches != PKSampler(labels, 4, 2, seed=0).batches(1)
    assert batches != PKSampler(labels, 4, 2, seed=1).batches(0)


def test_sampler_mistakes():
    assert said(PKSampler, [0, 0, 1, 2], 16, 4) == (
        "a batch of 16 identities x 4 images needs 16 identities, but there are only 3; "
        "lower identities to at most 3, as in --set identities=3"
    )
    assert said(PKSampler, [0, 0], 1, 0) == "a batch is P x K images with P and K at least 1, got 1 x 0"


# ----------------------------------------------------------------------------------------------------------- batches


def test_a_still_batch_is_the_normalised_images(pictures):
    for images, labels in loader(pictures, STILL).epoch(0):
        assert images.dtype == torch.float32 and images.shape == (6, 3, *SIZE)
        assert labels.dtype == torch.int64 and labels.shape == (6,)
        chosen = [i for batch in PKSampler(relabel(pictures)[0], 3, 2, 3).batches(0)[:1] for i in batch]
        raw = load_images([pictures[i] for i in chosen], SIZE).double() / 255
        mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(images.double(), (raw - mean) / std, atol=1e-5, rtol=0)
        break


def test_resuming_in_an_epoch_gives_the_same_batches(pictures):
    whole = list(loader(pictures).epoch(2))
    assert len(whole) == len(loader(pictures)) == 4
    assert same(loader(pictures).epoch(2, start=3), whole[3:])
    again = loader(pictures)
    list(again.epoch(0))
    assert same(again.epoch(2), whole)  # what came before does not matter, nor the cache that is filled now
    assert same(loader(pictures, cache_bytes=0).epoch(2), whole)
    assert not same(loader(pictures).epoch(1), whole)
    assert not same(loader(pictures, seed=4).epoch(2), whole)


def test_workers_change_nothing(pictures):
    expected = [list(loader(pictures).epoch(e)) for e in (0, 1)]
    parallel = loader(pictures, workers=2)
    before = torch.get_rng_state()
    assert same(parallel.epoch(0), expected[0])
    next(parallel.epoch(0))  # an epoch left in the middle
    assert same(parallel.epoch(1), expected[1])
    assert same(parallel.epoch(1, start=2), expected[1][2:])
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generators_are_left_alone_and_do_not_matter(pictures):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches = list(loader(pictures).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(99)
    assert same(loader(pictures).epoch(0), batches)


def test_each_augmentation_does_what_its_name_says(pictures):
    def batch(**options):
        return next(loader(pictures, Augment(**{"flip": 0, "pad": 0, "erase": 0, **options})).epoch(0))[0]

    still = batch()
    assert torch.equal(batch(flip=1), still.flip(3))
    erased = batch(erase=1)
    boxes = (erased == 0).all(1)
    share = boxes.float().mean((1, 2))
    assert ((share > 0.01) & (share < 0.45)).all()
    assert torch.equal(erased[~boxes[:, None].expand_as(erased)], still[~boxes[:, None].expand_as(still)])
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0]
    framed = v2.functional.pad(still - black, 4) + black
    for image, frame in zip(batch(pad=4), framed, strict=True):
        crops = [frame[:, y : y + 32, x : x + 16] for y in range(9) for x in range(9)]
        assert any(torch.allclose(image, crop, atol=1e-5) for crop in crops)
    assert not torch.equal(batch(pad=4), still)


def test_enlarged_pictures_are_cropped_to_the_input(pictures):
    wholes = [normalise(load_image(s.path, (40, 20))[None])[0] for s in pictures]
    places = set()
    for batch, labels in loader(pictures, Augment(0, 0, 0, 1.25)).epoch(0):
        assert batch.shape[2:] == SIZE
        for crop, label in zip(batch, labels, strict=True):
            found = [
                (y, x) for i, whole in enumerate(wholes) if relabel(pictures)[0][i] == label
                for y in range(9) for x in range(5) if torch.equal(whole[:, y : y + 32, x : x + 16], crop)
            ]
            assert len(found) == 1
            places.add(found[0])
    assert len(places) > 3
    assert said(Augment, 0, 0, 0, 0.9) == "augment enlarge is a factor from 1 to 4, got 0.9"


def test_augment_mistakes():
    assert said(Augment, 1.5) == "augment flip is a probability in [0, 1], got 1.5"
    assert said(Augment, 0.5, -1) == "augment pad is a number of pixels, 0 or more, got -1"
    assert said(partial(Augment, jitter=-0.1)) == "augment jitter is a strength in [0, 1], got -0.1"
    assert said(partial(Augment, rand_m=31)) == "augment rand_m is a number from 0 to 30, got 31"
    assert said(partial(Augment, auto_augment="rndaugment")) == (
        "unknown auto_augment 'rndaugment'; did you mean 'randaugment'? known: autoaugment, none, randaugment"
    )
    recipe = Recipe(flip=0.1, pad=3, erase=0.2, enlarge=1.5, jitter=0.3, auto_augment="randaugment", rand_n=3, rand_m=4,
                    patch=0.6)
    assert Augment.of(recipe) == Augment(0.1, 3, 0.2, 1.5, 0.3, "randaugment", 3, 4, 0.6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named(pictures, tmp_path, workers):
    path = tmp_path / "0001_c1.jpg"
    with open(pictures[0].path, "rb") as file:
        path.write_bytes(file.read()[:400])
    broken = [s._replace(path=str(path)) for s in pictures]
    message = (
        f"image {path} is truncated or unreadable; copy it again or delete it, and "
        "run `autoreid data NAME --root DIR` to list all unreadable files"
    )
    assert said(list, loader(broken, workers=workers).epoch(0)) == message
    assert said(load_images, broken, SIZE) == message
    assert said(load_image, "/no/such.jpg", SIZE) == (
        "no image /no/such.jpg; the dataset changed or moved: check it with `autoreid data NAME --root DIR`"
    )


def test_load_images_keeps_the_order_and_makes_grey_images_rgb(tmp_path):
    for value in (10, 200):
        Image.new("L", (12, 24), value).save(tmp_path / f"{value}.png")
    images = load_images([Sample(str(tmp_path / f"{v}.png"), 1, 1) for v in (200, 10)], SIZE)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, *SIZE)
    with torch.inference_mode():
        assert load_images([Sample(str(tmp_path / "10.png"), 1, 1)], SIZE).shape == (1, 3, *SIZE)
    assert images[0].unique().tolist() == [200] and images[1].unique().tolist() == [10]


# ------------------------------------------------------------------------------------------------------ augmentation


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 7)),
    larger=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    pad=st.integers(0, 12),
    chances=st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.7, 1.0])),
    seed=st.integers(0, 2**40),
)
def test_a_batch_is_its_pictures_one_pixel_at_a_time(size, larger, pad, chances, seed):
    picture = (size[0] + larger[0], size[1] + larger[1])
    numbers = augment.random_numbers(seed, 2, 5, 6)
    pictures = np.random.default_rng(seed).integers(0, 256, (6, 3, *picture), dtype=np.uint8)
    plan = augment.make_plan(Augment(chances[0], pad, chances[1]), numbers, picture, size)
    images = augment.crop(list(pictures), plan, size)
    boxes = torch.from_numpy(plan.boxes)
    finished = finish(images, boxes)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, *size) and finished.dtype == torch.float32
    for i, row in enumerate(numbers.tolist()):
        # frame, flip, top, left, erase, box top, box left, ten areas, ten ratios
        top, left = (reference_loading.place(row[2 + d], pad, picture[d], size[d]) for d in (0, 1))
        image = reference_loading.crop(pictures[i].tolist(), row[1] < chances[0], top, left, *size)
        assert images[i].tolist() == image
        attempts = list(zip(row[7:17], row[17:27], strict=True))
        box = reference_loading.box(row[4], row[5], row[6], attempts, chances[1], *size)
        assert tuple(boxes[i].tolist()) == box
        expected = torch.tensor(reference_loading.finish(image, box), dtype=torch.float64)
        torch.testing.assert_close(finished[i].double(), expected, atol=1e-6, rtol=0)


def test_normalise_is_that_of_torchvision_for_every_value():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = v2.functional.normalize(images.double() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalise(images).double(), expected, atol=1e-6, rtol=0)
    with torch.inference_mode():
        assert torch.equal(normalise(images), normalise(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_finishes_the_same_batch():
    images = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 31, 15], [5, 5, 1, 1]])
    assert torch.equal(finish(images.cuda(), boxes).cpu(), finish(images, boxes))


def test_random_numbers_are_those_of_seed_epoch_batch_and_position():
    rows = augment.random_numbers(1, 2, 3, 8)
    assert rows.shape == (8, augment.COLUMNS) and (rows >= 0).all() and (rows < 1).all()
    assert np.array_equal(augment.random_numbers(1, 2, 3, 5), rows[:5])  # whatever else is in the batch
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.intersect1d(augment.random_numbers(*other, 8), rows).size
    # batch 0 does not replay what the sampler drew: a trailing 0 would not change numpy's stream
    assert not np.intersect1d(augment.random_numbers(1, 2, 0, 8), np.random.default_rng([1, 2]).random(500)).size


class Given:
    """A sampler with the batches that it is given."""

    def __init__(self, batches) -> None:
        self.given = batches

    def batches(self, epoch):
        return self.given


def test_a_place_in_a_batch_does_not_depend_on_the_others(pictures):
    def batch(indices, **options):
        labels = list(range(len(pictures)))
        return next(TrainLoader(pictures, labels, SIZE, Given([indices]), PADDED, 3, **options).epoch(0))[0]

    whole = batch([5, 0, 7, 7, 2])
    assert torch.equal(batch([5, 0, 7]), whole[:3])
    assert torch.equal(batch([1, 0, 3, 7, 4])[[1, 3]], whole[[1, 3]])
    assert not torch.equal(whole[2], whole[3])  # the same picture, another place


@pytest.mark.parametrize("size", [(256, 128), (24, 8), (9, 60)])
def test_erased_boxes_have_the_distribution_of_torchvision(size):
    """Area, ratio and place of the box, and how often ten attempts are not enough, beside torchvision's own draws."""
    count = 4000
    torch.manual_seed(5)
    image = torch.zeros(3, *size)
    theirs = np.array([v1.RandomErasing.get_params(image, (0.02, 0.4), (0.3, 3.3), [0.0])[:4] for _ in range(count)])
    ours = augment.make_plan(Augment(erase=1), augment.random_numbers(7, 0, 0, count), size, size).boxes
    kept = [ours[ours[:, 2] > 0], theirs[(theirs[:, 2] < size[0]) | (theirs[:, 3] < size[1])]]
    chance = [len(boxes) / count for boxes in kept]
    assert abs(chance[0] - chance[1]) < 4 * np.sqrt(0.5 / count)
    bound = 1.95 * np.sqrt(2 / len(kept[1]))  # met by one pair of equal distributions in a thousand
    for measure in (
        lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] / (size[0] - b[:, 2]), lambda b: b[:, 1] / (size[1] - b[:, 3]),
    ):
        assert furthest(*(measure(boxes) for boxes in kept)) < bound
    area = [boxes[:, 2] * boxes[:, 3] for boxes in kept]
    assert furthest(area[0] * 1.1, area[1]) > bound  # a tenth more would be seen
    assert ((ours[:, :2] + ours[:, 2:]) <= np.array(size)).all() and (ours >= 0).all()
    half = augment.make_plan(Augment(erase=0.3), augment.random_numbers(7, 0, 0, count), size, size).boxes
    drawn = half[:, 2] > 0
    assert np.array_equal(half[drawn], ours[drawn])
    assert abs(drawn.mean() - 0.3 * chance[0]) < 4 * np.sqrt(0.21 / count)


def furthest(a, b) -> float:
    """Kolmogorov and Smirnov's distance: how far the two samples' distribution functions are apart at most."""
    values = np.concatenate([a, b])
    share = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return float(np.abs(share[0] - share[1]).max())


def test_mirrors_and_crops_are_uniform():
    plan = augment.make_plan(Augment(flip=0.25, pad=2), augment.random_numbers(0, 0, 0, 6000), (10, 6), (8, 6))
    assert abs(plan.flip.mean() - 0.25) < 0.025
    for places, of in zip(plan.corner.T, (range(-2, 5), range(-2, 3)), strict=True):
        assert sorted(set(places.tolist())) == list(of)
        counts = np.bincount(places + 2)
        assert np.abs(counts / 6000 - 1 / len(of)).max() < 0.025


@pytest.mark.parametrize("workers", [0, 1])
def test_raw_batches_are_finished_elsewhere_with_the_same_values(pictures, workers):
    finished = list(loader(pictures, Augment(pad=4, enlarge=1.25, erase=0.7)).epoch(1))
    raw = list(loader(pictures, Augment(pad=4, enlarge=1.25, erase=0.7), workers, raw=True).epoch(1))
    assert raw[0][0].dtype == torch.uint8 and raw[0][1].shape == (6, 4)
    assert sum(boxes[:, 2].count_nonzero() for _, boxes, _ in raw) > 5
    assert same([(finish(images, boxes), labels) for images, boxes, labels in raw], finished)


# -------------------------------------------------------------------------------------------------- colours, patches


def noise(count, size=(33, 18), seed=0) -> torch.Tensor:
    """Smooth noise: plain noise hardly changes when it is equalised."""
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, *size)).cumsum(3) // np.arange(1, size[1] + 1)
    return torch.from_numpy(values.astype(np.uint8))


def test_numbers_and_crops_of_recorded_results_stay():
    """Digests from before there were patches and colours: results that were recorded then can still be repeated."""
    numbers = augment.random_numbers(1, 2, 3, 64)
    plan = augment.make_plan(Augment(erase=0.7), numbers, (288, 144), (256, 128))
    values = [numbers.tobytes(), plan.corner.tobytes() + plan.boxes.tobytes() + plan.flip.tobytes()]
    assert [hashlib.sha256(v).hexdigest()[:16] for v in values] == ["e22319e0bb21a8e1", "65e0928ed604c9ef"]


def test_each_kind_has_its_own_random_numbers():
    rows = {of: augment.random_numbers(1, 2, 3, 8, of) for of in augment.STREAMS}
    assert len(np.unique(np.concatenate([r.ravel() for r in rows.values()]))) == sum(r.size for r in rows.values())
    for of in rows:
        assert np.array_equal(augment.random_numbers(1, 2, 3, 5, of), rows[of][:5])


@pytest.mark.parametrize("u", [0.1, 0.19, 0.21, 0.39, 0.41, 0.59, 0.61, 0.79, 0.81, 0.99])
def test_autoaugment_is_torchvisions(monkeypatch, u):
    """Every pair of the policy, with one number for all chances and signs, on either side of each chance that there is."""
    for pair, image in enumerate(noise(25)):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randint", lambda *a, pair=pair: torch.tensor(pair))
            patched.setattr(torch, "rand", lambda *a: torch.tensor(u))
            expected = v2.AutoAugment()(image)
        ours, row = image.clone()[None], np.array([[(pair + 0.5) / 25] + [u] * 15])
        augment.change(ours, Augment(auto_augment="autoaugment"), lambda of, row=row: row)
        assert torch.equal(ours[0], expected), augment.POLICY[pair]
        assert u > 0.4 or not torch.equal(ours[0], image)


@pytest.mark.parametrize("magnitude", [0, 9, 14, 30])
@pytest.mark.parametrize("u", [0.1, 0.9])
def test_randaugment_is_torchvisions(monkeypatch, magnitude, u):
    for n, image in enumerate(noise(14)):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randint", lambda *a, n=n: torch.tensor(n))
            patched.setattr(torch, "rand", lambda *a: torch.tensor(u))
            expected = v2.RandAugment(3, magnitude)(image)
        ours = image.clone()[None]
        row = np.array([[(n + 0.5) / 14, u] * 8])
        augment.change(ours, Augment(auto_augment="randaugment", rand_n=3, rand_m=magnitude), lambda of, row=row: row)
        assert torch.equal(ours[0], expected), augment.RANDOM[n]
        if magnitude == 30:
            assert torch.equal(ours[0], image) == (augment.RANDOM[n] == "identity"), augment.RANDOM[n]


def test_jitter_is_torchvisions():
    strength = 0.6
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    images, numbers = noise(30, SIZE), augment.random_numbers(0, 0, 0, 30, "jitter")
    numbers[:24, 4] = (np.arange(24) + 0.5) / 24
    numbers[24:27, :4], numbers[27:30, :4] = 0.0, 1.0  # the ends of the ranges
    changed = images.clone()
    augment.change_colours(changed, strength, numbers)
    orders = set()
    for image, ours, (*drawn, order) in zip(images, changed, numbers, strict=True):
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        factors = [low + (high - low) * u for (low, high), u in zip(ranges, drawn, strict=True)]
        fn_idx = augment.ORDERS[int(order * 24)]
        orders.add(fn_idx)
        names = ("brightness", "contrast", "saturation", "hue")
        expected = jitter.transform(image, {
            "fn_idx": torch.tensor(fn_idx), **{f"{n}_factor": f for n, f in zip(names, factors, strict=True)}
        })
        assert (ours.int() - expected.int()).abs().max() <= 1 and (ours != expected).float().mean() < 1e-3
        assert (ours.int() - image.int()).abs().max() > 3
    assert len(orders) == 24


def test_operations_are_drawn_alike_often():
    """Pairs of the policy, chances, RandAugment's operations and the signs have the shares that they should."""
    rows = augment.random_numbers(3, 0, 0, 8000, "auto").tolist()
    plain, with_sign = Counter(), Counter()
    for row in rows:
        for name, magnitude in augment.choose_operations(Augment(auto_augment="randaugment", rand_n=3), row, SIZE):
            plain[name] += 1
            with_sign[name] += magnitude < 0
    assert sorted(plain) == sorted(augment.RANDOM) and sum(plain.values()) == 24000
    for name, count in plain.items():
        assert abs(count / 24000 - 1 / 14) < 0.008, name
        share = 0.5 if name in augment.SIGNED else 0
        assert abs(with_sign[name] / count - share) < 0.06, name
    auto = [augment.choose_operations(Augment(auto_augment="autoaugment"), row, SIZE) for row in rows]
    wanted = Counter()
    for name, chance, _ in (operation for pair in augment.POLICY for operation in pair):
        wanted[name] += chance / 25
    found = Counter(name for chosen in auto for name, _ in chosen)
    assert set(found) == set(wanted) and all(abs(found[name] / 8000 - wanted[name]) < 0.02 for name in wanted)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    larger=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    count=st.integers(1, 7),
    chance=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**40),
)
def test_a_patch_is_its_pixels_one_at_a_time(size, larger, count, chance, seed):
    picture = (size[0] + larger[0], size[1] + larger[1])
    numbers = augment.random_numbers(seed, 1, 2, count, "patch")
    half = slice(count // 2, count)
    patches = augment.make_patches(chance, numbers, half, picture, size)
    rows = [reference_loading.patch(row, i, count, chance, picture, size) for i, row in enumerate(numbers.tolist())]
    expected = [(i, *row) for i, row in enumerate(rows[half]) if row]
    assert [tuple(p) for p in patches] == expected
    given = np.random.default_rng(seed).integers(0, 256, (count, 3, *picture), dtype=np.uint8)
    images = noise(count, size, seed)
    for p in patches:
        pasted = images[p.position].clone()
        augment.paste(pasted, given[p.donor], p._replace(turn=0))
        before, donor = images[p.position].tolist(), given[p.donor].tolist()
        assert pasted.tolist() == reference_loading.paste(before, donor, p.corner, p.size, p.place, p.mirror)
        turned = images[p.position].clone()
        augment.paste(turned, given[p.donor], p)
        (y, x), (h, w) = p.place, p.size
        pasted[:, y : y + h, x : x + w] = v2.functional.rotate(pasted[:, y : y + h, x : x + w], p.turn)
        assert torch.equal(turned, pasted)


def test_patches_have_the_distribution_of_osnets():
    count, size = 4000, (256, 128)
    numbers = augment.random_numbers(5, 0, 0, count, "patch")
    patches = augment.make_patches(0.3, numbers, slice(0, count), size, size)
    assert abs(len(patches) / count - 0.3) < 0.03
    patches = augment.make_patches(1.0, numbers, slice(0, count), size, size)
    rng = np.random.default_rng(0)

    def drawn() -> tuple[int, int]:  # as the authors do
        while True:
            area, ratio = size[0] * size[1] * rng.uniform(0.01, 0.5), rng.uniform(0.1, 10)
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if h < size[0] and w < size[1]:
                return h, w

    ours, theirs = np.array([p.size for p in patches]), np.array([drawn() for _ in range(count)])
    bound = 1.95 * np.sqrt(2 / len(ours))  # met by one pair of equal distributions in a thousand
    for measure in (lambda s: s[:, 0] * s[:, 1], lambda s: s[:, 0] / s[:, 1]):
        assert furthest(measure(ours), measure(theirs)) < bound < furthest(measure(ours) * 1.1, measure(theirs))
    free = np.array(size) - ours + 1
    for places in ([p.corner for p in patches], [p.place for p in patches]):
        uniform = (np.array(places) + rng.random((len(ours), 2))) / free
        assert all(furthest(u, rng.random(count)) < bound for u in uniform.T)
    assert abs(np.mean([p.mirror for p in patches]) - 0.5) < 0.03
    turns = Counter(p.turn for p in patches)
    assert sorted(turns) == list(range(-10, 11)) and abs(turns[0] / count - (0.5 + 0.5 / 21)) < 0.03
    away = [(p.donor - p.position) % count for p in patches]
    assert min(away) == 1 and furthest(np.array(away) / count, rng.random(count)) < bound


def test_a_patch_comes_from_another_picture_of_the_batch(pictures):
    still = next(loader(pictures, STILL, raw=True).epoch(0))[0]
    patched = next(loader(pictures, Augment(0, 0, 0, patch=1), raw=True).epoch(0))[0]
    numbers = augment.random_numbers(3, 0, 0, 6, "patch")
    patches = augment.make_patches(1, numbers, slice(0, 6), SIZE, SIZE)
    assert len(patches) == 6 and sum(p.turn == 0 for p in patches) > 1
    for p in patches:
        (y, x), (h, w), (from_y, from_x) = p.place, p.size, p.corner
        outside = torch.ones(SIZE, dtype=torch.bool)
        outside[y : y + h, x : x + w] = False
        assert torch.equal(patched[p.position][:, outside], still[p.position][:, outside])
        if p.turn == 0:
            piece = still[p.donor][:, from_y : from_y + h, from_x : from_x + w]
            assert torch.equal(patched[p.position][:, y : y + h, x : x + w], piece.flip(2) if p.mirror else piece)


@pytest.mark.parametrize("auto", ["autoaugment", "randaugment"])
def test_everything_at_once_does_not_depend_on_workers_or_threads(pictures, auto):
    everything = replace(ALL, auto_augment=auto)
    expected = list(loader(pictures, everything).epoch(1))
    assert same(loader(pictures, everything, workers=2).epoch(1), expected)
    assert same(loader(pictures, everything).epoch(1, start=2), expected[2:])
    torch.set_num_threads(3)
    assert same(loader(pictures, everything).epoch(1), expected) and torch.get_num_threads() == 3
    for off in ({"jitter": 0}, {"patch": 0}, {"auto_augment": "none"}):
        assert not same(loader(pictures, replace(everything, **off)).epoch(1), expected)


def test_colours_are_changed_by_one_thread(monkeypatch):
    """A large picture's mean, and so its contrast, has other last bits with more threads; workers have one."""
    seen, colours = [], augment.change_colours
    monkeypatch.setattr(augment, "change_colours", lambda *a: seen.append(torch.get_num_threads()) or colours(*a))
    torch.set_num_threads(3)
    augment.change(noise(2), Augment(jitter=1), lambda of: augment.random_numbers(0, 0, 0, 2, of))
    assert seen == [1] and torch.get_num_threads() == 3


def test_what_is_switched_off_costs_nothing(pictures, monkeypatch):
    drawn, numbers = [], augment.random_numbers

    def counted(seed, epoch, batch, count, of="crop"):
        drawn.append(of)
        return numbers(seed, epoch, batch, count, of)

    def never(*arguments):
        raise AssertionError("called for nothing")

    monkeypatch.setattr(autoreid.loading, "random_numbers", counted)
    for name in ("make_patches", "paste", "change_colours", "choose_operations", "_one_thread"):
        monkeypatch.setattr(augment, name, never)
    list(loader(pictures).epoch(0))
    assert drawn == ["crop"] * 4


# ------------------------------------------------------------------------------------------ ranks that train together


@pytest.mark.parametrize("processes", [2, 3])
def test_the_ranks_batches_one_after_another_are_the_one_process_batch(pictures, processes):
    counts = {1: 1, 2: 4, 3: 2, 4: 3, 5: 4, 6: 1}
    samples = [s for i, n in counts.items() for s in [s for s in pictures if s.identity == i][:n]]
    samples += [Tracklet("", 7, 0, tuple(s.path for s in pictures[:5]))] * 3
    labels, _ = relabel(samples)

    def of(rank, processes, start=0, **options):
        sampler = PKSampler(labels, 6, 2, 3)
        made = TrainLoader(samples, labels, SIZE, sampler, ALL, 3, rank=rank, processes=processes, **options)
        assert len(made) == 2
        return list(made.epoch(4, start))

    whole = of(0, 1)
    ranks = [of(rank, processes, workers=2 * (rank == 1)) for rank in range(processes)]
    for n, (images, ids) in enumerate(whole):
        assert torch.equal(torch.cat([batches[n][0] for batches in ranks]), images)
        assert torch.equal(torch.cat([batches[n][1] for batches in ranks]), ids)
        seen = [set(batches[n][1].tolist()) for batches in ranks]
        assert [len(s) for s in seen] == [6 // processes] * processes and len(set.union(*seen)) == 6
    assert same(of(1, processes, start=1), ranks[1][1:])
    raw = [of(rank, processes, raw=True) for rank in range(processes)]
    assert same([(finish(images, boxes), ids) for images, boxes, ids in raw[1]], ranks[1])


def test_a_rank_reads_what_it_needs_alone(pictures, decoded):
    labels, _ = relabel(pictures)
    sampler = PKSampler(labels, 6, 2, 3)
    made = TrainLoader(pictures, labels, SIZE, sampler, STILL, 3, rank=1, processes=2)
    list(made.epoch(0))
    wanted = [pictures[i].path for batch in sampler.batches(0) for i in batch[6:]]
    assert sorted(decoded) == sorted(set(wanted)) and len(wanted) == 12


def test_identities_that_cannot_be_shared_out(pictures):
    labels, _ = relabel(pictures)
    make = partial(TrainLoader, pictures, labels, SIZE, PKSampler(labels, 3, 2), rank=0, processes=2)
    assert said(make) == (
        "identities=3: allowed is a multiple of 2, the number of processes, as each trains on whole identities: set "
        "identities=4"
    )


# ---------------------------------------------------------------------------------------------- tracklets, bad files


def test_of_a_tracklet_a_random_frame_is_shown(tmp_path):
    for value in range(12):
        Image.new("RGB", (16, 32), (20 * value, 0, 0)).save(tmp_path / f"{value}.png")
    frames = [tuple(str(tmp_path / f"{value}.png") for value in of) for of in ((0,), range(1, 4), range(4, 11))]
    samples = [Tracklet("nowhere", i, 0, of) for i, of in enumerate(frames)] + [Sample(str(tmp_path / "11.png"), 3, 0)]
    made = TrainLoader(samples, [0, 1, 2, 3], SIZE, Given([[2, 0, 1, 3]] * 60), STILL, 3, raw=True)
    first, second = ([tuple(b[0][:, 0, 0, 0].div(20).int().tolist()) for b in made.epoch(e)] for e in (0, 1))
    shown = [set(column) for column in zip(*first, strict=True)]
    assert shown == [set(range(4, 11)), {0}, {1, 2, 3}, {11}]
    assert first != second and first == [
        tuple(b[0][:, 0, 0, 0].div(20).int().tolist())
        for b in TrainLoader(samples, [0, 1, 2, 3], SIZE, Given([[2, 0, 1, 3]] * 60), STILL, 3, 2, raw=True).epoch(0)
    ]


def test_readable_leaves_out_what_cannot_be_decoded(pictures, tmp_path):
    cut, gone, empty = (str(tmp_path / name) for name in ("cut.jpg", "gone.jpg", "empty.png"))
    with open(pictures[0].path, "rb") as file, open(cut, "wb") as short:
        short.write(file.read()[:400])
    open(empty, "w").close()
    good = pictures[0].path
    samples = [
        Sample(cut, 1, 0), pictures[1], Sample(gone, 2, 0), Sample(empty, 2, 1), Sample(cut, 9, 1),
        Tracklet(cut, 3, 0, (cut, good, gone, pictures[2].path)), Tracklet(cut, 4, 0, (cut, gone)),
        Tracklet(good, 5, 0, (good,)),
    ]
    kept, unreadable = readable(samples)
    assert kept == [pictures[1], Tracklet(good, 3, 0, (good, pictures[2].path)), samples[7]]
    assert unreadable == [cut, gone, empty]
    assert readable(pictures) == (pictures, [])


# ------------------------------------------------------------------------------------------------------ kept pictures


@pytest.fixture
def decoded(monkeypatch):
    """The paths that are decoded from now on."""
    seen, decode = [], autoreid.pictures._decode
    monkeypatch.setattr(autoreid.pictures, "_decode", lambda path, size: seen.append(path) or decode(path, size))
    return seen


def paths_of(samples) -> list[str]:
    return [s.path for s in samples]


def all_of(pictures: Pictures) -> np.ndarray:
    return np.stack(pictures.read(range(len(pictures))))


def test_a_picture_is_decoded_once_and_by_later_runs_never(pictures, tmp_path, decoded):
    expected = [list(loader(pictures, cache_bytes=0).epoch(e)) for e in (0, 1)]
    assert len(decoded) > 24  # each time anew
    decoded.clear()
    first = loader(pictures, cache=tmp_path / "cache")
    assert [same(first.epoch(e), expected[e]) for e in (0, 1)] == [True, True]
    assert sorted(decoded) == sorted(paths_of(pictures))
    decoded.clear()
    assert same(loader(pictures, cache=str(tmp_path / "cache")).epoch(0), expected[0])
    assert same(loader(pictures, workers=2, cache=tmp_path / "cache").epoch(1), expected[1])
    assert decoded == []
    (file,) = (tmp_path / "cache").glob("*.pictures")
    assert file.name.endswith("-32x16.pictures")


def test_the_workers_fill_the_file(pictures, tmp_path, decoded):
    batches = list(loader(pictures, workers=2, cache=tmp_path).epoch(0))
    assert same(loader(pictures, cache=tmp_path).epoch(0), batches)
    assert decoded == []


def test_other_pictures_have_another_file(tmp_path, decoded):
    names = [str(tmp_path / f"{i}.bmp") for i in range(3)]

    def draw(path, red, width=16, time=1_000_000_000):
        Image.new("RGB", (width, 32), (red, 0, 0)).save(path)
        os.utime(path, ns=(time, time))

    def reds(paths, size=SIZE) -> list[int]:
        decoded.clear()
        kept = all_of(Pictures(paths, size, tmp_path / "cache"))
        assert kept.shape == (len(paths), 3, *size) and decoded in ([], paths)
        return [*kept[:, 0, 0, 0].tolist(), "kept" if decoded == [] else "decoded"]

    for i, path in enumerate(names):
        draw(path, i)
    assert reds(names) == [0, 1, 2, "decoded"]
    assert reds(names) == [0, 1, 2, "kept"]
    draw(names[1], 77, time=1_000_000_001)
    assert reds(names) == [0, 77, 2, "decoded"]
    draw(names[1], 88, width=17, time=1_000_000_001)
    assert reds(names) == [0, 88, 2, "decoded"]
    draw(names[1], 1)
    assert reds(names) == [0, 1, 2, "kept"]  # as it was at first
    assert reds(names[:1]) == [0, "decoded"]
    assert reds(names[2:]) == [2, "decoded"]  # another path, of the same size and time
    assert reds(names[::-1]) == [2, 1, 0, "decoded"]
    assert reds(names, (16, 32)) == [0, 1, 2, "decoded"]
    assert reds([os.path.relpath(path) for path in names]) == [0, 1, 2, "kept"]


def test_a_checksum_is_computed_once(pictures, tmp_path, monkeypatch):
    kept, checksum, calls = Pictures(paths_of(pictures), SIZE, tmp_path), autoreid.pictures._checksum, []
    expected = all_of(kept)
    monkeypatch.setattr(autoreid.pictures, "_checksum", lambda picture: calls.append(1) or checksum(picture))
    assert np.array_equal(all_of(kept), expected) and not calls
    assert np.array_equal(all_of(Pictures(kept.paths, SIZE, tmp_path)), expected) and len(calls) == len(kept)


def test_damaged_pictures_are_decoded_again(pictures, tmp_path, decoded):
    paths = paths_of(pictures)
    expected = all_of(Pictures(paths, SIZE, tmp_path))
    (file,) = tmp_path.glob("*.pictures")
    good = file.read_bytes()
    start, each = len(good) - expected.size, expected[0].size

    def again(content) -> int:
        file.write_bytes(content)
        decoded.clear()
        assert np.array_equal(all_of(Pictures(paths, SIZE, tmp_path)), expected)
        assert file.read_bytes() == good  # mended
        return len(decoded)

    assert start == 8192 and again(good) == 0
    one_pixel, one_sum = bytearray(good), bytearray(good)
    one_pixel[start + 5 * each + 77] ^= 1
    one_sum[4096 + 8 * 3] ^= 1
    assert again(one_pixel) == 1 and decoded == [paths[5]]
    assert again(one_sum) == 1 and decoded == [paths[3]]
    swapped = good[:start] + good[start + each : start + 2 * each] + good[start : start + each] + good[start + 2 * each :]
    assert again(swapped) == 2
    assert again(good[:start] + bytes(expected.size)) == len(paths)  # the pixels were lost in a power cut
    for foreign in (good[:-1], good + b"x", b"", b"something else", bytes(len(good)), b"x" + good[1:]):
        assert again(foreign) == len(paths)


def test_a_killed_process_leaves_whole_pictures(pictures, tmp_path, decoded):
    paths = paths_of(pictures)
    expected = all_of(Pictures(paths, SIZE))
    decoded.clear()

    calls, checksum = iter(range(99)), autoreid.pictures._checksum

    def die_at_the_fourth(picture):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # its pixels are written, its checksum is not
        return checksum(picture)

    def killed():
        autoreid.pictures._checksum = die_at_the_fourth  # in the child alone
        all_of(Pictures(paths, SIZE, tmp_path))

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert np.array_equal(all_of(Pictures(paths, SIZE, tmp_path)), expected)
    assert decoded == paths[3:]


def test_processes_at_once_share_one_file(pictures, tmp_path):
    paths, context = paths_of(pictures), multiprocessing.get_context("fork")
    expected = all_of(Pictures(paths, SIZE))
    together, outcomes = context.Barrier(4), context.Queue()

    reserve, made = os.posix_fallocate, []

    def slowly(*arguments):
        made.append(1)
        time.sleep(0.1)
        reserve(*arguments)

    def run(number):
        autoreid.pictures.os.posix_fallocate = slowly  # in the child alone: the others come while it is being made
        together.wait()
        kept = Pictures(paths, SIZE, tmp_path)
        order = np.random.default_rng(number).permutation(len(paths)).tolist()
        outcomes.put((all(np.array_equal(kept.read([n])[0], expected[n]) for n in order), len(made)))

    children = [context.Process(target=run, args=(number,)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert sorted(outcomes.get() for _ in children) == [(True, 0)] * 3 + [(True, 1)]  # one made it
    assert len(list(tmp_path.glob("*.pictures"))) == 1
    assert np.array_equal(all_of(Pictures(paths, SIZE, tmp_path)), expected)


def test_a_spawned_worker_opens_the_same_file(pictures, tmp_path, decoded):
    kept = Pictures(paths_of(pictures), SIZE, tmp_path)
    expected = all_of(kept)
    decoded.clear()
    data = pickle.dumps(kept)
    assert len(data) < 20_000  # the names, not the pixels
    assert np.array_equal(all_of(pickle.loads(data)), expected) and decoded == []
    assert np.array_equal(all_of(pickle.loads(pickle.dumps(Pictures(kept.paths, SIZE)))), expected)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_threads_decode_in_order(pictures, tmp_path, cache_bytes):
    torch.set_num_threads(3)
    numbers = [7, 3, 3, 20, 0, 7]
    read = Pictures(paths_of(pictures), SIZE, cache_bytes=cache_bytes).read(numbers)
    assert np.array_equal(np.stack(read), load_images([pictures[n] for n in numbers], SIZE).numpy())
    missing = Pictures([*paths_of(pictures), "/no/such.jpg"], SIZE, cache_bytes=cache_bytes)
    assert said(missing.read, [1, 24, 2]).startswith("no image /no/such.jpg; ")


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"cache": "here"}])
def test_kept_pictures_cannot_be_written_to(pictures, tmp_path, options):
    if "cache" in options:
        options = {"cache": tmp_path}
    kept = Pictures(paths_of(pictures), SIZE, **options)
    one, two = kept.read([4, 4])
    assert np.array_equal(one, load_image(pictures[4].path, SIZE).numpy()) and np.array_equal(one, two)
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 0


def test_space_for_the_cache_is_looked_for_and_reserved(pictures, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(autoreid.pictures.shutil, "disk_usage", lambda folder: usage(0, 0, 36_000))
    assert said(Pictures, paths_of(pictures), SIZE, tmp_path) == (
        f"the picture cache takes 0.00 GB and {tmp_path} has 0.00 GB free; make room, give --cache another folder, "
        "or leave it out"
    )
    monkeypatch.undo()
    kept = Pictures(paths_of(pictures), SIZE, tmp_path)
    (file,) = tmp_path.glob("*.pictures")
    assert file.stat().st_size == 8192 + len(kept) * 3 * 32 * 16
    assert file.stat().st_blocks * 512 >= file.stat().st_size  # before a picture was read
    file.unlink()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(autoreid.pictures.os, "posix_fallocate", full)
    assert said(Pictures, paths_of(pictures), SIZE, tmp_path) == (
        f"cache folder {tmp_path} cannot be used: No space left on device; give --cache a folder that can be written, "
        "or leave it out"
    )
    assert not list(tmp_path.glob("*.pictures"))


def test_cache_mistakes(pictures, tmp_path):
    (tmp_path / "file").write_text("x")
    assert said(Pictures, paths_of(pictures), SIZE, tmp_path / "file") == (
        f"cache folder {tmp_path / 'file'} cannot be used: File exists; give --cache a folder that can be written, "
        "or leave it out"
    )
    assert said(Pictures, ["/no/such.jpg"], SIZE, tmp_path) == (
        "no image /no/such.jpg; the dataset changed or moved: check it with `autoreid data NAME --root DIR`"
    )
    assert len(Pictures([], SIZE, tmp_path)) == 0


def test_a_cache_under_the_home_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Pictures(paths_of(pictures), SIZE, "~/kept")
    assert len(list((tmp_path / "kept").glob("*.pictures"))) == 1


def test_the_loaders_processes_outlive_every_sigterm_but_their_parents(pictures):
    """A signal to the whole group must not take the batches away that the training still needs to stop in good order;
    nor twice, as where a launcher passes it on, nor while the processes start."""
    expected, found = [images for images, _ in loader(pictures).epoch(0)], []
    ahead = loader(pictures, workers=1)
    start = threading.Thread(target=lambda: found.extend(images for images, _ in ahead.epoch(0)))
    start.start()
    pids = set()
    while start.is_alive():  # from the first moment of their lives on
        for process in multiprocessing.active_children():
            subprocess.run(["kill", "-TERM", str(process.pid)], check=False)
            pids.add(process.pid)
    assert pids and len(found) == len(expected) and all(map(torch.equal, found, expected))
    (process,) = multiprocessing.active_children()
    process.terminate()  # what the loader does with one that hangs
    process.join(30)
    assert process.exitcode == 0

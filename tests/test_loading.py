"""Loading: the search split, the P x K sampler, and batches that depend on nothing but their name."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    PKSampler,
    TrainLoader,
    load_image,
    load_images,
    normalise,
    relabel,
    split_for_search,
)

SIZE = (32, 16)
STILL = Augment(flip=0, pad=0, erase=0)


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
        "lower identities to at most 3"
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

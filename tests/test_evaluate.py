"""Features from a network, metrics from features, and a retrieval task out of training identities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.evaluate import evaluate, extract, held_out_split
from autoreid.loading import load_images, normalise
from autoreid.metrics import retrieval_metrics

SIZE = (16, 8)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> list[Sample]:
    """Five identities, three cameras, two images each: the identity is the colour."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    samples = []
    for identity in range(1, 6):
        colour = rng.integers(0, 255, 3)
        for camera in range(1, 4):
            for n in range(2):
                path = folder / f"{identity:04d}_c{camera}s1_{n}.png"
                pixels = np.clip(colour + rng.normal(0, 8, (16, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
                samples.append(Sample(str(path), identity, camera))
    return samples


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten())


def test_extract_is_the_network_in_eval_mode(people):
    net = a_net()
    net[1].eval()  # a frozen norm in a training network stays frozen
    statistics = net[1].running_mean.clone()
    features = extract(net, people, SIZE, batch=7)
    assert net.training and net[0].training and not net[1].training
    assert torch.equal(net[1].running_mean, statistics)
    assert features.shape == (30, 16) and features.dtype == torch.float32
    assert not features.requires_grad and not features.is_inference()
    images = normalise(load_images(people, SIZE))
    with torch.no_grad():
        torch.testing.assert_close(features, net.eval()(images))
        mirrored = (net(images) + net(images.flip(3))) / 2
    torch.testing.assert_close(extract(net, people, SIZE, views=2), mirrored)
    larger = normalise(load_images(people, (round(SIZE[0] * 1.125), round(SIZE[1] * 1.125))))
    (h, w), (hh, ww) = SIZE, larger.shape[2:]
    middle = (round((hh - h) / 2), round((ww - w) / 2))
    views = []
    for top, left in ((0, 0), (0, ww - w), (hh - h, 0), (hh - h, ww - w), middle):
        crop = larger[:, :, top : top + h, left : left + w]
        views += [crop, crop.flip(3)]
    with torch.no_grad():
        ten = torch.stack([net(view) for view in views]).mean(0)
    torch.testing.assert_close(extract(net, people, SIZE, views=10), ten)
    with pytest.raises(UserError, match=r"^views=5: allowed is 1 \(the picture\), 2 \(its mirror image too\) or 10"):
        extract(net, people, SIZE, views=5)
    assert not net.training


def test_the_mode_returns_when_extraction_fails(people):
    net = a_net()
    with pytest.raises(UserError, match="^no image /gone.jpg;"):
        extract(net, [people[0], Sample("/gone.jpg", 1, 1)], SIZE)
    assert net.training


def test_nothing_to_extract_from():
    with pytest.raises(UserError) as error:
        extract(a_net(), [], SIZE)
    expected = "there are no images to extract features from; check the dataset with `autoreid data NAME`"
    assert str(error.value) == expected


def test_evaluate_is_extract_then_metrics(people):
    query, gallery = held_out_split(people)
    net = a_net()
    features = [extract(net, part, SIZE) for part in (query, gallery)]
    tags = [([s.identity for s in part], [s.camera for s in part]) for part in (query, gallery)]
    for protocol, metric in (("market1501", "euclidean"), ("plain", "cosine")):
        expected = retrieval_metrics(features[0], *tags[0], features[1], *tags[1], protocol=protocol, metric=metric)
        assert evaluate(net, query, gallery, SIZE, protocol=protocol, metric=metric) == expected
    assert expected.mAP > 0.5 and expected.scored == expected.total == 15


def test_held_out_split_by_hand():
    def s(identity, camera, n):
        return Sample(f"/{identity}_{camera}_{n}", identity, camera)

    samples = [
        s(1, 1, 0), s(1, 1, 1), s(1, 2, 0), s(1, 2, 1),  # two cameras, two images: first of each asks
        s(2, 1, 0), s(2, 1, 1),  # one camera: answers only
        s(3, 1, 0), s(3, 2, 0),  # single images: one asks, the other answers
        s(4, 1, 0), s(4, 2, 0), s(4, 2, 1),  # camera 1's image must answer, or camera 2's would have no match
    ]  # fmt: skip
    query, gallery = held_out_split(samples[::-1])
    assert query == [s(1, 1, 0), s(1, 2, 0), s(3, 1, 0), s(4, 2, 0)]
    assert sorted(query + gallery) == sorted(samples)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=30))
def test_every_held_out_query_has_a_match_from_another_camera(tags):
    samples = [Sample(f"/{i:03d}", identity, camera) for i, (identity, camera) in enumerate(tags)]
    query, gallery = held_out_split(samples)
    assert sorted(query + gallery) == samples
    assert len({s[1:] for s in query}) == len(query)  # one per identity and camera
    for q in query:
        assert any(g.identity == q.identity and g.camera != q.camera for g in gallery)
    several = {s.identity for s in samples if len({o.camera for o in samples if o.identity == s.identity}) > 1}
    assert {q.identity for q in query} == several

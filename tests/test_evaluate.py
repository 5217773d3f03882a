"""Features from a network, metrics from features, and a retrieval task out of training identities."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from autoreid import evaluate as module
from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.evaluate import Evaluation, evaluate, extract, extract_readable, held_out_split
from autoreid.loading import load_images, normalise
from autoreid.metrics import metrics_from_distances, retrieval_metrics
from autoreid.ranked import ranked_lists
from autoreid.rerank import expand_queries, rerank

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


@pytest.fixture(scope="module")
def tracklets(people) -> list[Sample]:
    """One tracklet of 1 to 5 frames after the other, and a single picture without frames."""
    paths, made, start = [s.path for s in people], [], 0
    for n, length in enumerate((3, 1, 5, 2, 4)):
        frames = tuple(paths[start : start + length])
        made.append(Sample(frames[0], n // 2, n % 2, frames))
        start += length
    return [*made, people[-1]]


@pytest.mark.parametrize("batch", [1, 4, 128])
@pytest.mark.parametrize("views", [1, 2])
def test_a_tracklets_feature_is_the_mean_or_the_maximum_of_its_frames(tracklets, batch, views):
    net = a_net().eval()
    one_by_one = []
    for sample in tracklets:
        frames = [sample._replace(path=path, frames=()) for path in sample.frames or [sample.path]]
        one_by_one.append(extract(net, frames, SIZE, views=views))
    mean = extract(net, tracklets, SIZE, batch=batch, views=views)
    torch.testing.assert_close(mean, torch.stack([frames.sum(0) / len(frames) for frames in one_by_one]))
    largest = extract(net, tracklets, SIZE, batch=batch, views=views, pooling="max")
    torch.testing.assert_close(largest, torch.stack([frames.max(0).values for frames in one_by_one]))
    assert not torch.equal(mean, largest)
    for features in (mean, largest):
        assert features.dtype == torch.float32 and not features.is_inference() and not features.requires_grad
    with pytest.raises(UserError, match="^unknown pooling 'median';.* known: max, mean$"):
        extract(net, tracklets, SIZE, pooling="median")


def test_no_more_frames_in_memory_than_a_batch(tracklets, monkeypatch):
    sizes, load = [], module.load_images
    monkeypatch.setattr(module, "load_images", lambda samples, size: (sizes.append(len(samples)), load(samples, size))[1])
    extract(a_net(), tracklets, SIZE, batch=4)
    assert sizes == [4, 4, 4, 4]  # 16 pictures of 6 samples


def broken(people, folder, *numbers):
    """The same samples, of which these are half a file."""
    samples = list(people)
    for n in numbers:
        path = folder / f"broken_{n}.png"
        path.write_bytes(Path(people[n].path).read_bytes()[:60])
        samples[n] = people[n]._replace(path=str(path))
    return samples


def test_unreadable_pictures_are_named_or_left_out(people, tmp_path):
    samples = broken(people, tmp_path, 0, 3, 29)
    samples[8] = samples[8]._replace(path="/gone.jpg")
    net = a_net()
    with pytest.raises(UserError, match=f"^image {samples[0].path} is truncated or unreadable;"):
        extract(net, samples, SIZE, batch=7)
    features, kept, unreadable = extract_readable(net, samples, SIZE, batch=7)
    assert unreadable == [samples[n].path for n in (0, 3, 8, 29)]
    assert kept == [people[n] for n in range(30) if n not in (0, 3, 8, 29)]
    torch.testing.assert_close(features, extract(net, kept, SIZE))
    whole, same, none = extract_readable(net, people, SIZE)
    assert (same, none) == (people, []) and torch.equal(whole, extract(net, people, SIZE))
    for batch in (1, 2):  # a whole batch may be unreadable, also the first
        assert torch.allclose(extract_readable(net, samples, SIZE, batch=batch)[0], features, atol=1e-6)
    with pytest.raises(UserError, match=f"^none of the 2 images can be read, the first is {samples[0].path};"):
        extract_readable(net, [samples[0], samples[3]], SIZE)
    assert net.training


def test_a_tracklet_remains_while_one_of_its_frames_does(people, tmp_path):
    bad = [s.path for s in broken(people, tmp_path, 0, 1, 2, 3)[:4]]
    half = Sample(bad[0], 1, 1, (bad[0], people[4].path, people[5].path))
    nothing = Sample(bad[1], 2, 1, tuple(bad[1:4]))
    features, kept, unreadable = extract_readable(a_net(), [half, nothing, people[6]], SIZE)
    assert (kept, unreadable) == ([half, people[6]], bad)
    torch.testing.assert_close(features[0], extract(a_net(), people[4:6], SIZE).mean(0))


def test_evaluate_counts_what_it_leaves_out(people, tmp_path):
    query, gallery = held_out_split(people)
    query, gallery = broken(query, tmp_path, 0, 9), broken(gallery, tmp_path, 5)
    gone = {s.path for s in [*query, *gallery] if "broken" in s.path}
    net = a_net()
    with pytest.raises(UserError, match="is truncated or unreadable"):
        evaluate(net, query, gallery, SIZE)
    metrics = evaluate(net, query, gallery, SIZE, how=Evaluation(skip_unreadable=True))
    assert len(gone) == metrics.unreadable == metrics.to_dict()["unreadable"] == 3
    rest = [[s for s in part if s.path not in gone] for part in (query, gallery)]
    expected = evaluate(net, *rest, SIZE)
    lost = sum(s.path in gone for s in query)
    assert expected.unreadable == 0 and lost == 2 and metrics.total == expected.total + lost == len(query)
    assert {**metrics.to_dict(), "unreadable": 0, "total": expected.total} == expected.to_dict()
    of_all = evaluate(net, query, gallery, SIZE, how=Evaluation(skip_unreadable=True, denominator="all"))
    assert of_all.mAP == pytest.approx(metrics.mAP * metrics.scored / len(query))


def test_of_one_list_an_image_that_cannot_be_read_no_longer_asks(people, tmp_path):
    samples = broken(people, tmp_path, 3)
    how = Evaluation(skip_unreadable=True)
    metrics = evaluate(a_net(), samples, samples, SIZE, protocol="vehicleid/test-800", how=how)
    assert (metrics.total, metrics.scored, metrics.unreadable) == (25, 24, 1)
    alone = samples[:7]  # of identity 2 nothing is left: it takes no gallery image, and none asks for it
    alone = broken(alone, tmp_path, 6)
    metrics = evaluate(a_net(), alone, alone, SIZE, protocol="vehicleid/test-800", how=how)
    assert (metrics.total, metrics.scored, metrics.unreadable) == (5, 4, 2)


def test_one_list_is_extracted_once_and_draws_its_gallery(people, monkeypatch):
    calls, load = [], module.load_images
    monkeypatch.setattr(module, "load_images", lambda samples, size: (calls.extend(samples), load(samples, size))[1])
    net = a_net()
    features, tags = extract(net, people, SIZE), ([s.identity for s in people], None)
    for gallery in (people, list(people)):
        calls.clear()
        metrics = evaluate(net, people, gallery, SIZE, protocol="vehicleid/test-800")
        assert len(calls) == 30
        assert metrics == retrieval_metrics(features, *tags, features, *tags, protocol="vehicleid/test-800")
    assert (metrics.repeats, metrics.total, metrics.scored) == (10, 25, 25) and metrics.std is not None


def test_the_denominator_and_the_pooling_reach_the_metrics(people, tracklets):
    net = a_net()
    query, gallery = people[:6], people[2:12]  # identity 1's camera 1 asks, 2 and 3 answer
    lonely = [*query, people[29]]
    choices = [Evaluation(denominator=name) for name in ("scored", "all")]
    scored, everyone = (evaluate(net, lonely, gallery, SIZE, how=how) for how in choices)
    assert everyone.mAP * 7 == pytest.approx(scored.mAP * scored.scored) and scored.scored < 7
    for pooling in ("mean", "max"):
        features = extract(net, tracklets, SIZE, pooling=pooling)
        sides = ([s.identity for s in tracklets], [s.camera for s in tracklets])
        expected = retrieval_metrics(features, *sides, features, *sides, protocol="mars")
        assert evaluate(net, tracklets, tracklets, SIZE, protocol="mars", how=Evaluation(frames=pooling)) == expected


@pytest.mark.parametrize("how", [Evaluation(), Evaluation(rerank=(4, 2, 0.3))])
def test_without_cameras_a_query_does_not_find_itself(people, tmp_path, how):
    """MARS keeps its queries in the gallery, VeRi a copy of each in the gallery's folder."""
    shuffled = [s._replace(identity=1 + n % 5) for n, s in enumerate(people)]  # or all would be found anyway
    net, query, gallery = a_net(), shuffled[:4], shuffled[2:]
    copy = tmp_path / Path(gallery[0].path).name
    copy.write_bytes(Path(gallery[0].path).read_bytes())
    for other in (gallery, [gallery[0]._replace(path=str(copy)), *gallery[1:]]):
        found = evaluate(net, query, other, SIZE, protocol="plain", how=how)
        # as if each query had a gallery of its own: the numbers of the query's own pictures stand for cameras
        pictures = [0, 1, 2, 3], [2, 3, *range(4, 30)]
        features = extract(net, query, SIZE), extract(net, other, SIZE)
        sides = [(f, [s.identity for s in part], numbers)
                 for f, part, numbers in zip(features, (query, other), pictures, strict=True)]
        assert found == replace(retrieval_metrics(*sides[0], *sides[1], rerank=how.rerank), protocol="plain")
        assert found.mAP < 1


@pytest.mark.parametrize(("query", "gallery", "protocol", "words"), [
    (slice(0, 6), slice(6, 30), "market1501", "none of the 6 queries has a gallery image of its identity, so nothing"),
    (slice(0, 1), slice(1, 2), "market1501", "every gallery image of the queries' identities has camera 1, and protocol"),
    (slice(0, 1), slice(0, 1), "plain", "none of the 1 queries has a gallery image of its identity beside itself"),
    (slice(0, 30, 6), slice(0, 30, 6), "vehicleid/test-800", "none of the 5 queries has a second image of its identity"),
    (slice(0, 3), slice(3, 6), "vehicleid/test-800", "protocol 'vehicleid/test-800' draws its gallery from one list of"),
])
def test_what_names_tell_is_found_before_a_picture_is_opened(people, monkeypatch, query, gallery, protocol, words):
    monkeypatch.setattr(module, "load_images", None)
    with pytest.raises(UserError) as fault:
        evaluate(a_net(), people[query], people[gallery], SIZE, protocol)
    assert str(fault.value).startswith(words)


def test_what_must_be_said_of_figures(people):
    rule, lines = module.check_task(people[:6], people[:2], "market1501")
    assert rule.name == "market1501" and len(lines) == 1 and "4 of 6 queries can be scored" in lines[0]
    assert module.check_task(people[:6], people, "market1501")[1] == []


@pytest.mark.parametrize("how", [Evaluation(), Evaluation(views=10), Evaluation(expand=(3, 1.0)),
                                 Evaluation(views=2, expand=(3, 0.0), rerank=(4, 2, 0.3))])
def test_ranked_lists_are_of_the_ranking_that_the_figures_are_of(people, how):
    query, gallery = held_out_split(people)
    extracted = module.extract_both(a_net(), query, gallery, SIZE, how=how)
    lists = ranked_lists(**extracted.ranking(), count=1000, depth=len(gallery))
    assert len(lists) == 15
    metrics = extracted.metrics()
    assert metrics == evaluate(a_net(), query, gallery, SIZE, how=how)
    assert np.mean([ranked.average_precision for ranked in lists]) == pytest.approx(metrics.mAP, abs=1e-12)
    for ranked in lists:
        kinds = [kind for kind in ranked.kinds if kind != "junk"]
        hits = [(n + 1) / (i + 1) for n, i in enumerate(i for i, kind in enumerate(kinds) if kind == "match")]
        assert np.mean(hits) == pytest.approx(ranked.average_precision)  # what is shown is what was scored


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


def test_without_cameras_the_first_image_of_an_identity_asks():
    samples = [Sample(f"/{i}_{n}.jpg", i, 0) for i, count in ((1, 3), (2, 1), (3, 2)) for n in range(count)]
    query, gallery = held_out_split(samples)
    assert [s.path for s in query] == ["/1_0.jpg", "/3_0.jpg"]
    assert sorted([*query, *gallery]) == samples


def test_reranking_and_expansion_are_those_of_rerank_py(people):
    net, query, gallery = a_net(), *held_out_split(people)
    tags = [([s.identity for s in part], [s.camera for s in part]) for part in (query, gallery)]
    asking, answering = (extract(net, part, SIZE) for part in (query, gallery))
    ranked = metrics_from_distances(rerank(asking, answering, 4, 2, 0.3), *tags[0], *tags[1])
    assert evaluate(net, query, gallery, SIZE, how=Evaluation(rerank=(4, 2, 0.3))) == ranked
    longer = expand_queries(asking, answering, 3, 1.0)
    unit = answering / answering.norm(dim=1, keepdim=True)
    expanded = retrieval_metrics(longer, *tags[0], unit, *tags[1])
    assert evaluate(net, query, gallery, SIZE, how=Evaluation(expand=(3, 1.0))) == expanded


@pytest.mark.parametrize(("how", "protocol", "words"), [
    ({"rerank": (0, 6, 0.3)}, "market1501", "k1 must be a whole number of neighbours, 1 or more, got 0"),
    ({"expand": (3, -1.0)}, "market1501", "alpha must be 0 (plain mean) or above, got -1.0;"),
    ({"rerank": (20, 6, 0.3)}, "vehicleid/test-800", "protocol 'vehicleid/test-800' draws its gallery anew, and"),
    ({"frames": "mid"}, "mars", "unknown frames 'mid'; known: max, mean"),
    ({"denominator": "none"}, "plain", "unknown denominator 'none'; known: all, scored"),
])
def test_an_evaluation_is_checked_before_anything_runs(how, protocol, words):
    with pytest.raises(UserError) as fault:
        Evaluation(**how).check(protocol)
    assert str(fault.value).startswith(words)

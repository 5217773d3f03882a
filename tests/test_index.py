"""The gallery file: what it holds, that no crash and no second process loses anything, who may be said to match."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import planted
import pytest
import reference_neighbours as slow
import torch
from PIL import Image

from autoreid import data, index, plots_index
from autoreid.cli import build_parser, main
from autoreid.errors import UserError
from autoreid.evaluate import extract
from autoreid.index import Index, Picture, Threshold, pictures_of, threshold_of, validation_pictures
from autoreid.neighbours import FloatGallery, Int8Gallery, nearest
from autoreid.network import find_model, load_weights, save_weights
from autoreid.plots import png
from autoreid.runs import Preempted

PEOPLE = {"anna": 3, "bert": 2, "carl": 2}


def write_weights(path, width=4, seed=0, **metadata):
    torch.manual_seed(seed)
    spec = find_model("resnet18", {"stem": 3, "width": width})
    header = {"input": [32, 16], "dataset": "market", "recipe": "none", "seed": 0, "init": "scratch", "name": "small"}
    save_weights(path, spec.build(), spec, **{**header, **metadata})
    return path


def write_people(folder, people=PEOPLE, cameras=True):
    for number, (name, count) in enumerate(people.items(), start=1):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            picture = planted.whole(np.random.default_rng([number, n]), number)
            Image.fromarray(picture).save(folder / name / (f"{n}_c{1 + n % 2}.png" if cameras else f"{n}.png"))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights, people and their index; not to be changed."""
    home = tmp_path_factory.mktemp("made")
    weights, people = write_weights(home / "small.safetensors"), write_people(home / "people")
    Index.create(home / "people.index", weights).add(people)
    return home


@pytest.fixture
def own(made, tmp_path):
    """A copy of the index to change; the weights are where they were."""
    path = tmp_path / "own.index"
    path.write_bytes((made / "people.index").read_bytes())
    return path


# ---------------------------------------------------------------------------------------- folders
def test_a_folder_per_identity(tmp_path):
    write_people(tmp_path)
    Image.new("RGB", (4, 8)).save(tmp_path / "beside.png")
    (tmp_path / "-1").mkdir()
    Image.new("RGB", (4, 8)).save(tmp_path / "-1" / "x_c1.png")
    (tmp_path / "empty").mkdir()
    pictures, lines = pictures_of(tmp_path)
    assert [p.identity for p in pictures] == ["anna"] * 3 + ["bert"] * 2 + ["carl"] * 2
    assert [p.camera for p in pictures] == [1, 2, 1, 1, 2, 1, 2] and all(Path(p.path).is_absolute() for p in pictures)
    assert len(lines) == 3 and "beside.png" in lines[0] and "empty" in lines[1] and "1 junk" in lines[2]


def test_named_and_unnamed_pictures(tmp_path):
    for name in ("0002_c1s1_000451_03.jpg", "0002_c3s1_000001_03.jpg", "-1_c1s1_000001_00.jpg"):
        Image.new("RGB", (4, 8)).save(tmp_path / name)
    pictures, lines = pictures_of(tmp_path)
    assert [p[1:] for p in pictures] == [("0002", 1), ("0002", 3)] and "junk" in lines[0]
    Image.new("RGB", (4, 8)).save(tmp_path / "visitor.jpg")
    pictures, lines = pictures_of(tmp_path)
    assert {p.identity for p in pictures} >= {"visitor", "0002_c1s1_000451_03"} and "an identity of its own" in lines[0]
    Image.new("RGB", (4, 8)).save(tmp_path / "visitor.png")  # another picture, another identity
    assert {p.identity for p in pictures_of(tmp_path)[0]} >= {"visitor.jpg", "visitor.png"}


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "gallery" / "anna").mkdir(parents=True)
    for path, words in ((tmp_path / "no", "is not there"), (tmp_path, "did you mean .*gallery"),
                        (tmp_path / "gallery" / "anna", "holds no pictures")):
        with pytest.raises(UserError, match=words):
            pictures_of(path)


# ---------------------------------------------------------------------------------------- the file
def test_it_holds_the_embeddings_and_says_what_made_it(made):
    opened = Index.open(made / "people.index")
    net, _ = load_weights(made / "small.safetensors")
    samples = [data.Sample(path, 0, 0) for path in opened.paths]
    assert torch.allclose(opened.features, extract(net, samples, (32, 16)), atol=1e-5)
    assert [Path(path).parent.name for path in opened.paths] == opened.identities
    summary = opened.summary()
    assert (summary["pictures"], summary["identities"], summary["edition"], summary["input"]) == (7, 3, 1, [32, 16])
    assert summary["weights"]["sha256"] == index.sha256_of(made / "small.safetensors")
    assert str(made) not in json.dumps(opened._paths)  # under its own folder: they move together


def test_pictures_and_index_move_together(made, tmp_path):
    (tmp_path / "moved").mkdir()
    for path in ["people.index", *Index.open(made / "people.index")._paths]:
        (tmp_path / "moved" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "moved" / path).write_bytes((made / path).read_bytes())
    opened = Index.open(tmp_path / "moved" / "people.index")
    assert all(Path(path).exists() and str(path).startswith(str(tmp_path)) for path in opened.paths)
    assert opened.add(tmp_path / "moved" / "people").present == 7


def test_a_path_with_dots_is_the_same_path(made, tmp_path, monkeypatch):
    write_people(tmp_path / "people")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    Index.create("../g.index", made / "small.safetensors").add("../people")
    gallery = Index.open(tmp_path / "g.index")
    assert not any(Path(path).is_absolute() for path in gallery._paths) and gallery.add(tmp_path / "people").present == 7
    assert Index.open("../g.index").paths == gallery.paths


def test_the_same_pictures_are_not_doubled_and_changed_ones_replaced(made, tmp_path, monkeypatch):
    people = write_people(tmp_path / "people")
    gallery = Index.create(tmp_path / "g.index", made / "small.safetensors")
    assert gallery.add(people).added == 7
    before = (tmp_path / "g.index").read_bytes()
    monkeypatch.setattr(index.Extractor, "embed", None)  # nothing is embedded again
    assert vars(gallery.add(people)) == vars(index.Change(present=7))
    assert (tmp_path / "g.index").read_bytes() == before
    monkeypatch.undo()
    changed = people / "anna" / "0_c1.png"
    Image.fromarray(planted.texture(np.random.default_rng(5), 9)).save(changed)
    old = gallery.features.clone()
    found = gallery.add(people)
    assert (found.replaced, found.present, found.added) == (1, 6, 0) and len(gallery) == 7
    assert not torch.equal(gallery.features[0], old[0]) and torch.equal(gallery.features[1:], old[1:])
    assert Index.open(tmp_path / "g.index").header["edition"] == 2


def test_unreadable_pictures_are_named_and_left_out(made, tmp_path):
    people = write_people(tmp_path / "people")
    (people / "bert" / "9_c1.png").write_bytes(b"\x89PNG half a picture")
    gallery = Index.create(tmp_path / "g.index", made / "small.safetensors")
    found = gallery.add(people)
    assert found.added == 7 and found.unreadable == [str(people / "bert" / "9_c1.png")]
    for path in people.rglob("*.png"):
        path.write_bytes(b"no picture")
    nothing = Index.create(tmp_path / "none.index", made / "small.safetensors")
    assert len(nothing.add(people).unreadable) == 8 and not (tmp_path / "none.index").exists()


def test_identities_are_removed(own):
    gallery = Index.open(own)
    kept = gallery.features[[3, 4]].clone()
    before = own.read_bytes()
    with pytest.raises(UserError, match="no identity 'karl' among the 3 of .*did you mean 'carl'"):
        gallery.remove(["anna", "karl"])
    assert own.read_bytes() == before
    assert gallery.remove(["anna", "carl"]) == 5
    again = Index.open(own)
    assert again.identities == ["bert", "bert"] and torch.equal(again.features, kept) and again.header["edition"] == 2


def test_other_weights_are_refused(own, tmp_path):
    other = write_weights(tmp_path / "other.safetensors", seed=1)
    people = write_people(tmp_path / "more", {"dora": 1})
    with pytest.raises(UserError, match="was made by small .* are other weights .* anew: autoreid index DIR "
                       "--weights .*other.safetensors --out .* --overwrite$") as fault:
        Index.open(own, other)  # before anything is removed or said of it
    assert "\n" not in str(fault.value)
    fresh = Index.create(tmp_path / "late.index", other)  # while it embeds another process writes the file by its weights
    (tmp_path / "late.index").write_bytes(own.read_bytes())
    with pytest.raises(UserError, match="are other weights"):
        fresh.add(people)
    assert (tmp_path / "late.index").read_bytes() == own.read_bytes()


def test_weights_that_moved_can_be_given(own, made, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((made / "small.safetensors").read_bytes())
    gallery = Index.open(own)
    gallery.header["weights"]["path"] = str(tmp_path / "gone.safetensors")
    query = str(made / "people" / "anna" / "0_c1.png")
    with pytest.raises(UserError, match="no weights at .*gone.* give --weights FILE"):
        gallery.search([query])
    gallery._weights = moved
    assert gallery.search([query])[0][0].identity == "anna"


def test_a_file_that_is_no_index(made, tmp_path):
    (tmp_path / "bad").write_bytes(b"nothing")
    for path, words in ((tmp_path / "none", "no index at"), (tmp_path / "bad", "damaged or no index"),
                        (made / "small.safetensors", "is no index")):
        with pytest.raises(UserError, match=words):
            Index.open(path)
    with pytest.raises(UserError, match="is there already"):
        Index.create(made / "people.index", made / "small.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        Index.open(tmp_path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((made / "small.safetensors").read_bytes())
    with pytest.raises(UserError, match="is the file of the weights"):
        Index.create(copy, copy, overwrite=True)
    with pytest.raises(UserError, match="unknown dtype 'int4'"):
        Index.create(tmp_path / "new", made / "small.safetensors", "int4")


# ---------------------------------------------------------------------------------------- crashes and company
KILLED = """
import os, signal, sys, torch
from autoreid import index
whole = index.save_file
def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    data = open(path, "rb").read()
    open(path, "wb").write(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
index.save_file = half
index.Index.open(sys.argv[1]).add(sys.argv[2])
"""


def test_killed_in_the_middle_of_a_write_the_old_file_is_whole(own, made, tmp_path):
    people, before = write_people(tmp_path / "more", {"dora": 2}), own.read_bytes()
    ended = subprocess.run([sys.executable, "-c", KILLED, str(own), str(people)], timeout=300)
    assert ended.returncode == -signal.SIGKILL and own.read_bytes() == before
    assert len(list(tmp_path.glob(f".{own.name}.????????"))) == 1  # what it left
    gallery = Index.open(own)
    assert len(gallery) == 7 and gallery.add(people).added == 2
    assert not list(tmp_path.glob(f".{own.name}.????????")) and len(Index.open(own)) == 9


def test_two_that_add_at_once_both_survive(own, tmp_path, monkeypatch):
    folders = [write_people(tmp_path / name, {name: 2}) for name in ("dora", "emil", "fred")]
    galleries = [Index.open(own) for _ in folders]  # all hold the first edition
    for gallery in galleries:
        gallery.extractor()
    together, put = threading.Barrier(3), Index._put

    def at_once(self, *args):
        together.wait(60)
        put(self, *args)

    monkeypatch.setattr(Index, "_put", at_once)
    threads = [threading.Thread(target=g.add, args=(folder,)) for g, folder in zip(galleries, folders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Index.open(own)
    assert found.header["edition"] == 4 and len(found) == 13
    assert sorted(set(found.identities)) == ["anna", "bert", "carl", "dora", "emil", "fred"]


def test_what_another_process_has_added_meanwhile_is_no_replacement(own, tmp_path):
    people = write_people(tmp_path / "more", {"dora": 2})
    first, second = Index.open(own), Index.open(own)
    second.extractor()
    embed = second._extractor.embed

    def late(paths):
        assert first.add(people).added == 2
        return embed(paths)

    second._extractor.embed = late
    found = second.add(people)
    assert (found.added, found.replaced, found.present) == (0, 0, 2) and len(Index.open(own)) == 9


def test_the_files_of_an_index_of_a_similar_name_are_left_alone(tmp_path):
    gallery = planted_index(tmp_path / "g", ["a", "b"])
    others = [tmp_path / name for name in (".g.old.lock", ".g.new.lock", "g.notahex!-1.hnsw")]
    for other in others:
        other.touch()
    (tmp_path / ".g.abc_0123").touch()
    gallery.remove(["a"])
    assert all(other.exists() for other in others) and not (tmp_path / ".g.abc_0123").exists()
    odd = planted_index(tmp_path / "g[1]", ["a", "b"])
    (tmp_path / ".g[1].abc_0123").touch()
    odd.remove(["a"])
    assert not (tmp_path / ".g[1].abc_0123").exists()


def test_stopped_and_started_again_it_ends_in_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 3)
    asked = iter([False, True])
    monkeypatch.setattr(index, "asked_to_stop", lambda: next(asked, False))
    gallery = Index.create(tmp_path / "g.index", made / "small.safetensors")
    with pytest.raises(Preempted):
        gallery.add(made / "people")
    part = Index.open(tmp_path / "g.index")
    assert len(part) == 6 and part.add(made / "people").added == 1
    whole = Index.open(made / "people.index")
    assert part.identities == whole.identities and torch.allclose(part.features, whole.features, atol=1e-5)


def test_long_work_is_written_on_the_way(made, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 3)
    monkeypatch.setattr(index, "SAVE_EVERY", -1.0)
    gallery = Index.create(tmp_path / "g.index", made / "small.safetensors")
    assert gallery.add(made / "people").added == 7 and gallery.header["edition"] == 3


# ---------------------------------------------------------------------------------------- dtypes
def test_half_precision_and_int8(made, tmp_path):
    whole = Index.open(made / "people.index")
    for dtype, size in (("float16", 2), ("int8", 1)):
        gallery = Index.create(tmp_path / dtype, made / "small.safetensors", dtype)
        gallery.add(made / "people")
        opened = Index.open(tmp_path / dtype)
        assert opened.features.element_size() == size
        room = opened.header["scale"] / 2 * 1.001 if dtype == "int8" else 1e-3
        assert (opened.floats(opened.features) - whole.features).abs().max() <= room
        [matches] = opened.search(whole.features[:1], top=7)
        stored = opened.floats(opened.features)
        asked = opened.floats(opened.stored(whole.features[:1])) if dtype == "int8" else whole.features[:1]
        distances, indices = nearest(asked, stored, 7)
        assert [m.path for m in matches] == [opened.paths[i] for i in indices[0]]
        np.testing.assert_allclose([m.distance for m in matches], distances[0], rtol=1e-5, atol=1e-6)


def test_the_scale_is_the_weights_own_or_the_first_pictures(made, tmp_path):
    gallery = Index.create(tmp_path / "a", made / "small.safetensors", "int8")
    gallery.extractor().scale = 0.125
    found = gallery.add(made / "people")
    assert gallery.header["scale"] == 0.125 and found.values == gallery.features.numel()
    gallery = Index.create(tmp_path / "b", made / "small.safetensors", "int8")
    assert gallery.add(made / "people" / "anna").clipped == 0
    scale = gallery.header["scale"]
    assert gallery.features.abs().max() == 127
    real = gallery.extractor().embed
    gallery.extractor().embed = lambda paths: (lambda f, k, u: (f * 3, k, u))(*real(paths))
    found = gallery.add(made / "people" / "bert")
    assert gallery.header["scale"] == scale and found.clipped > 0 and found.values == 2 * gallery.header["dims"]


# ---------------------------------------------------------------------------------------- asking
def test_search_ranks_by_exact_distance(made):
    gallery = Index.open(made / "people.index")
    [matches] = gallery.search([made / "people" / "bert" / "0_c1.png"], top=100)
    assert [m.rank for m in matches] == list(range(1, 8)) and matches[0].distance < 1e-4
    assert matches[0].path == str(made / "people" / "bert" / "0_c1.png") and matches[0].match is None
    query = gallery.extractor().embed([str(made / "people" / "bert" / "0_c1.png")])[0]
    distances, indices = nearest(query, gallery.features, 7)
    assert [m.path for m in matches] == [gallery.paths[i] for i in indices[0]]
    cosines = torch.nn.functional.cosine_similarity(query, gallery.features[indices[0]])
    np.testing.assert_allclose([m.cosine for m in matches], cosines, atol=1e-5)


def test_by_identity_each_has_its_nearest_picture(tmp_path):
    gallery = planted_index(tmp_path / "g", [f"p{i % 40}" for i in range(400)])
    query = torch.zeros(1, 8)
    for top in (1, 3, 39, 50):
        [matches] = gallery.search(query, top, "identity")
        nearest_of = {}
        for place in gallery.features.double().norm(dim=1).argsort().tolist():
            nearest_of.setdefault(gallery.identities[place], gallery.paths[place])
        assert {m.identity: m.path for m in matches} == dict(list(nearest_of.items())[:top])
        assert [m.identity for m in matches] == list(nearest_of)[:top]


def planted_index(path, identities, dtype="float32", dims=8):
    """An index of random features, without weights."""
    header = {"format": "autoreid-index", "version": 1, "id": "0123456789", "edition": 0, "input": [32, 16], "dims": dims,
              "weights": {"sha256": "0" * 64, "label": "planted", "path": "none"}, "dtype": dtype, "scale": None,
              "threshold": None}  # fmt: skip
    gallery = Index(path, header)
    features = torch.randn(len(identities), dims, generator=torch.Generator().manual_seed(3))
    put(gallery, identities, features)
    return gallery


def put(gallery, identities, features):
    if gallery.header["dtype"] == "int8":
        gallery.header["scale"] = 0.03
    paths = [str(gallery.path.parent / f"{name}-{i}.png") for i, name in enumerate(identities)]
    gallery._put([(Picture(*entry), bytes(16)) for entry in zip(paths, identities)], features, index.Change())


def test_the_graph_answers_is_kept_and_made_again_for_another_edition(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    gallery = planted_index(tmp_path / "g", [f"p{i}" for i in range(300)])
    query = torch.randn(5, 8)
    exact = gallery.search(query, 10, engine="exact")
    found = gallery.search(query, 10, engine="hnsw")
    for a, b in zip(exact, found):
        assert [m.path for m in a] == [m.path for m in b]
        np.testing.assert_allclose([m.distance for m in a], [m.distance for m in b], rtol=1e-4)
    [kept] = tmp_path.glob("g.*.hnsw")
    assert "making the graph of 300 pictures" in capsys.readouterr().err
    again = Index.open(tmp_path / "g")
    assert again.chosen_engine("auto", 1) == "exact"  # small
    monkeypatch.setattr(index, "HNSW_FROM", 100)
    few = index.HNSW_QUERIES
    assert [again.chosen_engine("auto", n) for n in (1, few, few + 1)] == ["hnsw", "hnsw", "exact"]
    deep = index.GRAPH_DEPTH
    assert [again.chosen_engine("auto", 1, top) for top in (deep, deep + 1)] == ["hnsw", "exact"]
    again.search(query[:1], 10)
    assert not capsys.readouterr().err  # read, not made
    again.remove(["p0"])
    assert not kept.exists() and again.chosen_engine("auto", 1) == "exact"
    [first] = again.search(gallery.features[:1], 300, engine="hnsw")
    assert len(first) == 299 and "p0" not in {m.identity for m in first}
    [kept] = tmp_path.glob("g.*.hnsw")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert Index.open(tmp_path / "g").search(query, 5, engine="hnsw")[0][0].rank == 1  # damaged: made again


def test_a_graph_is_not_taken_for_that_of_a_copy_that_went_another_way(tmp_path):
    pytest.importorskip("faiss")
    path = tmp_path / "g"
    first = planted_index(path, [f"p{i}" for i in range(20)])
    start = path.read_bytes()
    first.remove(["p1"])
    one_way = path.read_bytes()
    path.write_bytes(start)
    other = Index.open(path)
    other.remove(["p2"])  # also edition 2, also 19 pictures
    other.search(torch.zeros(1, 8), 5, engine="hnsw")
    path.write_bytes(one_way)
    found = Index.open(path).search(first.features[1:2], 1, engine="hnsw")
    assert found[0][0].distance == 0 and found[0][0].identity == "p2"


def test_what_cannot_be_asked(tmp_path):
    gallery = planted_index(tmp_path / "g", ["a", "b"], "int8")
    for options, words in (({"engine": "hnsw"}, "searched exactly"), ({"engine": "flat"}, "unknown engine"),
                           ({"by": "camera"}, "unknown by"), ({"top": 0}, "1 or more")):
        with pytest.raises(UserError, match=words):
            gallery.search(torch.zeros(1, 8), **options)
    with pytest.raises(UserError, match="the query has 3 dims"):
        gallery.search(torch.zeros(1, 3))
    gallery.remove(["a", "b"])
    with pytest.raises(UserError, match="holds no pictures"):
        gallery.search(torch.zeros(1, 8))


# ---------------------------------------------------------------------------------------- the threshold
@pytest.mark.parametrize("cameras", [1, 3])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.37])
def test_the_threshold_is_the_twins(cameras, rate):
    rng = np.random.default_rng(cameras)
    who, seen = rng.integers(0, 9, 60).tolist(), rng.integers(0, cameras, 60).tolist()
    x = rng.standard_normal((9, 4))[who] + rng.standard_normal((60, 4))
    found = threshold_of(x, [str(i) for i in who], seen, rate)
    genuine, impostors = slow.pairs(x, who, seen)
    assert found.distance == pytest.approx(slow.threshold(impostors, rate), rel=1e-6)
    room = found.distance * (1 + 1e-6)
    assert found.false_match_rate == pytest.approx(sum(d <= room for d in impostors) / len(impostors))
    assert rate - 2 / len(impostors) < found.false_match_rate <= rate
    assert found.false_non_match_rate == pytest.approx(sum(d > room for d in genuine) / len(genuine))
    assert (found.genuine, found.impostors, found.across_cameras) == (len(genuine), len(impostors), cameras > 1)


def test_impostors_that_tie_beyond_the_rate_do_not_match():
    x = np.array([[0.0]] * 10 + [[1.0]] * 10 + [[5.0]] * 10)  # 1 is as near to 0 in 100 pairs of 300
    who = [f"{i // 10}" for i in range(30)]
    found = threshold_of(x, who, [0] * 30, 0.2)
    assert found.false_match_rate == 0 and found.distance < 1 and found.false_non_match_rate == 0
    assert threshold_of(x, who, [0] * 30, 0.5).distance == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_what_a_search_calls_a_match_is_what_the_rate_counts(tmp_path, dtype):
    """Codes of small numbers, or pictures that are there twice: ties everywhere, which rounding would break."""
    generator = torch.Generator().manual_seed(1)
    who = [i // 4 for i in range(120)]
    if dtype == "int8":
        stored = torch.randint(-3, 4, (120, 6), dtype=torch.int8, generator=generator)
        gallery, scale = Int8Gallery(stored, 0.0371), 0.0371
    else:
        stored, scale = torch.randn(24, 16, generator=generator).repeat(5, 1) + 3, None
        gallery = FloatGallery(stored)
    found = gallery.search(stored, 120)
    impostors = [distance for i in range(120) for j, distance in zip(found.indices[i], found.distances[i])
                 if i < j and who[i] != who[j]]
    for rate in (0.01, 0.02, 0.033, 0.04, 0.1, 0.2, 0.3):
        threshold = threshold_of(stored, who, [0] * 120, rate, scale)
        matching = sum(distance <= threshold.distance for distance in impostors) / len(impostors)
        assert matching <= rate and matching == pytest.approx(threshold.false_match_rate, abs=1e-9)


def test_too_little_to_set_a_threshold_by():
    x, who = np.random.default_rng(0).standard_normal((20, 3)), ["a", "b"] * 10
    with pytest.raises(UserError, match="at least 10,000 impostor pairs and the 20 .* make 100: ask for 0.1 or more"):
        threshold_of(x, who, [0] * 20, 1e-3)
    assert threshold_of(x, who, [0] * 20, 0.1).impostors == 100
    for number in range(5, 40):  # what the line asks for is enough
        with pytest.raises(UserError) as fault:
            threshold_of(np.ones((number, 1)), list(range(number - 1)) + [0], [0] * number, 1e-6)
        if hint := re.search("ask for ([0-9.]+) or more", str(fault.value)):
            assert threshold_of(np.ones((number, 1)), list(range(number - 1)) + [0], [0] * number, float(hint[1]))
        else:
            assert number == 5
    with pytest.raises(UserError, match="there is no genuine pair"):
        threshold_of(x, list(range(20)), [0] * 20, 0.1)
    with pytest.raises(UserError, match="none has two pictures by two cameras"):
        threshold_of(x, who, [0, 1] * 10, 0.1)
    for rate in (0, 1, -1, float("nan")):
        with pytest.raises(UserError, match="above 0 and below 1"):
            threshold_of(x, who, [0] * 20, rate)


def test_only_people_that_were_not_trained_on_may_set_it(tmp_path):
    planted.write_dataset(tmp_path, planted.whole, identities=6)
    planted.write_dataset(tmp_path, planted.whole, identities=3, layout="veri")
    splits = data.load("market", tmp_path, parts=("train",))
    origin = {"trained_on": "market", "train_fingerprint": data.fingerprint(splits, ("train",))}

    def extractor(**metadata):
        return index.Extractor(write_weights(tmp_path / "w.safetensors", **metadata))

    with pytest.raises(UserError, match="trained on all its training identities; retrain with --set held_out"):
        validation_pictures("market", str(tmp_path), extractor(origin=origin, held_out=[]))
    with pytest.raises(UserError, match="trained on all its training identities"):  # weights that say nothing of it
        validation_pictures("market", str(tmp_path), extractor())
    found, said = validation_pictures("market", str(tmp_path), extractor(origin=origin, held_out=[2, 5]))
    assert {p.identity for p in found} == {"2", "5"} and len(found) == 16 and "held-out" in said
    with pytest.raises(UserError, match="other lists of images"):
        validation_pictures("market", str(tmp_path), extractor(origin={**origin, "train_fingerprint": "x"}, held_out=[2]))
    with pytest.raises(UserError, match="shows people of mars, which the weights were trained on; retrain"):
        validation_pictures("market", str(tmp_path), extractor(origin={**origin, "trained_on": "mars"}))
    begun = {**origin, "init": "file", "init_file": "other.safetensors"}
    _, said = validation_pictures("veri", str(tmp_path), extractor(origin=begun))
    assert "began with other.safetensors, and whom" in said
    found, said = validation_pictures("veri", str(tmp_path), extractor(origin=origin, held_out=[]))
    assert len({p.identity for p in found}) == 3 and said == "veri, training identities"
    found, _ = validation_pictures(str(write_people(tmp_path / "own")), None, extractor(origin=origin, held_out=[]))
    assert {p.identity for p in found} == set(PEOPLE)
    with pytest.raises(UserError, match="unknown dataset or folder 'markte'; did you mean 'market'"):
        validation_pictures("markte", None, extractor())


@pytest.mark.parametrize("one, other, same", [
    ("cuhk03/detected", "cuhk03/labeled", True), ("drawn-people", "drawn-people-tiny", True), ("market", "mars", True),
    ("market+500k/all", "market", True), ("market", "duke", False), ("drawn-people", "drawn-vehicles", False),
])
def test_datasets_of_the_same_people(one, other, same):
    assert (index._people(one) == index._people(other)) is same


def test_training_records_who_was_held_out(tmp_path):
    planted.write_dataset(tmp_path, planted.whole, identities=8, test_identities=3)
    assert main([
        "retrain", "resnet18", "--dataset", "market", "--root", str(tmp_path), "--out", str(tmp_path / "out"),
        "--epochs", "1", "--input", "32x16",
        *(word for pair in ("stem=3", "width=4", "identities=2", "images=2", "held_out=0.4")
          for word in ("--set", pair)),
    ]) == 0  # fmt: skip
    [weights] = (tmp_path / "out" / "market").glob("*.safetensors")
    pictures, _ = validation_pictures("market", str(tmp_path), index.Extractor(weights))
    held_out = {int(p.identity) for p in pictures}
    assert len(held_out) == 3 and held_out == set(load_weights(weights)[1]["held_out"])


# ---------------------------------------------------------------------------------------- the commands
def test_the_commands(made, tmp_path, capsys):
    out, more = tmp_path / "new folder" / "g.index", write_people(tmp_path / "more", {"d<b>ora": 2})
    people = write_people(tmp_path / "val", {f"v{i}": 4 for i in range(12)})

    def run(*words, status=0):
        assert main(list(map(str, words))) == status
        found = capsys.readouterr()
        return (json.loads(found.out) if "--json" in words else found.out), found.err

    figures, err = run("index", made / "people", "--weights", made / "small.safetensors", "--out", out, "--json")
    assert figures["added"] == 7 and figures["edition"] == 1 and "next: autoreid index --out" in err
    text, _ = run("index", more, "--out", out, "--add")
    assert "2 pictures added" in text and "9 pictures of 4 identities" in text
    query = made / "people" / "carl" / "0_c1.png"
    found, err = run("find", query, "--index", out, "--top", 3, "--json")
    assert found["queries"][0]["matches"][0]["identity"] == "carl" and found["engine"] == "exact"
    assert found["queries"][0]["matches"][0]["match"] is None and "no threshold" in err
    text, _ = run("index", "--out", out, "--validation", people, "--false-match-rate", "0.05")
    assert "match at a distance of at most" in text and "two cameras" in text
    page, picture = tmp_path / "found.html", tmp_path / "found.png"
    (more / "d<b>ora" / "0_c1.png").unlink()
    found, _ = run("find", query, more / "d<b>ora" / "1_c2.png", "--index", out, "--top", 99, "--by", "identity", "--html",
                   page, "--picture", picture, "--json")
    matches = found["queries"][0]["matches"]
    limit = found["threshold"]["distance"]
    assert len(matches) == 4 and [m["match"] for m in matches] == [m["distance"] <= limit for m in matches]
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") >= 7 and "d&lt;b&gt;ora" in text and "<b>" not in text
    assert "http" not in text.replace("http-equiv", "") and Image.open(picture).size[0] > 300
    _, err = run("find", query, "--index", out, "--html", page, status=2)
    assert "--overwrite" in err
    run("index", write_people(tmp_path / "comma", {"d,e": 1}), "--out", out, "--add")
    text, _ = run("index", "--out", out, "--remove", "d,e")
    assert "1 picture removed" in text
    text, _ = run("index", "--out", out, "--remove", "anna,bert", "--remove", "d<b>ora")
    assert "7 pictures removed" in text and "2 pictures of 1 identity" in text


@pytest.mark.parametrize("words, said", [
    (["index", "PEOPLE", "--weights", "WEIGHTS", "--out", "INDEX"], "is there already: --add adds to it"),
    (["index", "PEOPLE", "--out", "INDEX"], "is there already: --add adds to it"),
    (["index", "PEOPLE", "--out", "NEW"], "a new index needs --weights FILE"),
    (["index", "--out", "NEW"], "no index at"),
    (["index", "--out", "INDEX", "--add"], "--add needs the folder of pictures"),
    (["index", "PEOPLE", "--out", "INDEX", "--add", "--overwrite"], "contradict"),
    (["index", "PEOPLE", "--out", "INDEX", "--add", "--dtype", "int8"], "keeps the one it was made with"),
    (["index", "--out", "INDEX", "--validation", "PEOPLE"], "needs at least 10,000 impostor pairs"),
    (["index", "PEOPLE", "--weights", "WEIGHTS", "--out", "NEW", "--validation", "PEOPLE"], "10,000 impostor pairs"),
    (["index", "PEOPLE", "--weights", "WEIGHTS", "--out", "NEW", "--validation", "PEOPLE", "--false-match-rate", "2"],
     "above 0 and below 1"),
    (["index", "--out", "INDEX", "--false-match-rate", "0.01"], "--false-match-rate is of --validation"),
    (["index", "--out", "INDEX", "--root", "data"], "--root is of --validation"),
    (["index", "--out", "INDEX", "--validation", "market"], "the weights were trained|dataset 'market'"),
    (["find", "WEIGHTS", "--index", "INDEX"], "cannot be read as a picture"),
    (["find", "nothing.jpg", "--index", "INDEX"], "no picture at nothing.jpg"),
    (["find", "WEIGHTS", "--index", "WEIGHTS"], "is no index"),
    (["find", "nothing.jpg", "--index", "INDEX", "--engine", "fast"], "unknown engine 'fast'"),
    (["find", "nothing.jpg", "--index", "INDEX", "--top", "0"], "top=0: allowed is 1 or more"),
    (["find", "nothing.jpg", "--index", "INDEX", "--html", "a.htm"], "give the name of a .html file"),
])
def test_mistakes_are_one_line(made, tmp_path, capsys, words, said):
    places = {"PEOPLE": made / "people", "WEIGHTS": made / "small.safetensors", "INDEX": made / "people.index",
              "NEW": tmp_path / "new.index"}
    before = (made / "people.index").read_bytes()
    assert main([str(places.get(word, word)) for word in words]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(said, err) and "Traceback" not in err and err.count("\nautoreid: ") == 0
    assert (made / "people.index").read_bytes() == before and not (tmp_path / "new.index").exists()


def test_a_stopped_command_says_how_to_go_on(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 3)
    asked = iter([True])
    monkeypatch.setattr(index, "asked_to_stop", lambda: next(asked, False))
    out = tmp_path / "g.index"
    assert main(["index", str(made / "people"), "--weights", str(made / "small.safetensors"), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "g.index holds 3 pictures so far" in said
    command = said[said.index("go on with: autoreid ") :].split("\n")[0].split()[4:]
    assert command[-1] == "--add"
    assert main(command) == 0 and len(Index.open(out)) == 7
    capsys.readouterr()
    asked = iter([True])
    monkeypatch.setattr(index.Extractor, "embed", lambda self, paths: (torch.empty(0, self.net.dims), [], list(paths)))
    assert main(["index", str(made / "people"), "--weights", str(made / "small.safetensors"), "--out", str(out),
                 "--overwrite"]) == 0  # fmt: skip
    said = capsys.readouterr().err  # the old one is there still, and is not to be added to
    assert "nothing was embedded yet" in said and "--add" not in said and "--overwrite" in said


def test_a_picture_is_drawn_of_any_names_and_of_many_answers(made):
    image = str(made / "people" / "anna" / "0_c1.png")
    names = ["$\\frac$", "$x_$", "\udcff"] + ["anna"] * 30
    matches = [{"rank": i + 1, "identity": name, "path": image, "distance": 1.0, "cosine": 0.5, "match": None}
               for i, name in enumerate(names)]
    figure = plots_index.answers([{"image": image, "matches": matches}] * 2, "in people$_$.index", False)
    png(figure)
    assert len(figure.axes) == 2 * (1 + plots_index.ANSWERS)
    assert f"the first {plots_index.ANSWERS} of 33 answers" in figure.get_supxlabel()
    text = plots_index.page([{"image": "\udcff.jpg", "matches": matches}], "a", [])
    assert text.encode() and text.count("data:image") == 33


def test_the_threshold_is_kept_and_decides(own):
    gallery = Index.open(own)
    with gallery._newest():
        gallery.header["threshold"] = vars(Threshold(1e-3, 0.01, 0.009, 0.2, 10, 1000, True, "people", 5))
    opened = Index.open(own)
    assert opened.threshold == Threshold(1e-3, 0.01, 0.009, 0.2, 10, 1000, True, "people", 5)
    [matches] = opened.search(opened.features[2:3], 3)
    assert [m.match for m in matches] == [True, False, False]


def test_the_documents_commands_parse_and_its_python_runs(made, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "gallery.md").read_text()
    shell, python = ("".join(re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)) for kind in ("bash", "python"))
    commands = [line.split("#")[0] for line in shell.splitlines()]
    assert len(commands) >= 8
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])
    monkeypatch.chdir(tmp_path)
    Index.create("people.index", made / "small.safetensors").add(write_people(Path("people")))
    write_people(Path("more-people"), {"dora": 1})
    Path("query.jpg").write_bytes((made / "people" / "carl" / "0_c1.png").read_bytes())
    exec(compile(python, "gallery.md", "exec"), {})
    assert set(Index.open("people.index").identities) == {"bert", "carl", "dora"}

"""Every dataset with lists of its own, the user's own images, and several joined: read as published, wrong copies named."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import miniature
import numpy as np
import pytest
from miniature import WRITERS, image, text
from PIL import Image

from autoreid import data
from autoreid.data import (
    DATASETS,
    Sample,
    check,
    cuhk03,
    describe,
    duke,
    fingerprint,
    full_names,
    leaks,
    load,
    locate,
    msmt17,
    picture_numbers,
    vehicleid,
    veri_oracle,
    veri_wild,
)
from autoreid.errors import UserError

SETS = ("market", "market+500k", "msmt17", "cuhk03", "duke", "mars", "veri", "vehicleid", "veri-wild", "vric")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOREID_CACHE", str(tmp_path / "cache"))


def said(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def seen(samples, folder: Path) -> list[tuple]:
    """(path inside the folder, identity, camera)."""
    return [(os.path.relpath(s.path, folder), s.identity, s.camera) for s in samples]


def tags(samples) -> list[tuple[int, int]]:
    return [s[1:3] for s in samples]


# ------------------------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", WRITERS)
def test_a_sound_copy_is_loaded_whole_and_has_no_problem(name, tmp_path):
    WRITERS[name](tmp_path / "data")
    splits = load(name, tmp_path / "data")
    assert splits.name == name and splits.train and splits.query and splits.gallery
    for part in ("train", "query", "gallery"):
        samples = getattr(splits, part)
        assert all(os.path.isabs(s.path) and os.path.isfile(s.path) and ".." not in s.path for s in samples)
        assert all(type(s.identity) is int and type(s.camera) is int for s in samples)
        assert getattr(load(name, tmp_path / "data", parts=(part,)), part) == samples
        assert not any("__MACOSX" in s.path or os.path.basename(s.path).startswith(".") for s in samples)
    assert min(s.identity for s in splits.train) > 0
    report = json.loads(json.dumps(check(name, tmp_path / "data")))
    assert report["problems"] == [] and report["missing"] == report["unreadable"] == report["leaking"] == []
    assert report["protocol"] == splits.protocol and report["train_part"] == splits.train_part
    assert report["splits"]["gallery"]["junk"] == splits.junk
    assert "no problem found" in describe(report)


@pytest.mark.parametrize("name", WRITERS)
def test_labels_and_order_are_the_same_on_every_machine(name, tmp_path, monkeypatch):
    """A directory listing backwards, and the whole copy moved elsewhere: the same relative paths, labels and order."""
    for place in ("here", "there"):
        WRITERS[name](tmp_path / place)

    def relative(place):
        splits = load(name, tmp_path / place)
        parts = (splits.train, splits.query, splits.gallery)
        return [[(os.path.basename(s.path), *s[1:3]) for s in part] for part in parts]

    here = relative("here")
    honest = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: honest(path)[::-1])
    assert relative("there") == here


def test_every_protocol_is_known_and_every_dataset_has_a_copy_here():
    from autoreid.metrics import PROTOCOLS

    protocols = {layout.protocol for d in DATASETS.values() for ways in d.variants.values() for layout in ways} - {""}
    assert protocols <= set(PROTOCOLS)
    written = {name.partition("/")[0] for name in WRITERS}
    assert {name for name, dataset in DATASETS.items() if not dataset.drawn} == written == {*SETS, "folder", "csv"}


# Published counts, typed in from the sources a second time: images, then identities of train, query and gallery.
COUNTS = {
    "market": ((12_936, 3_368, 19_732), (751, 750, 750), 6),
    "market+500k": ((12_936, 3_368, 519_732), (751, 750, 750), None),
    "msmt17": ((30_248, 11_659, 82_161), (1_041, 3_060, 3_060), 15),
    "msmt17/train+val": ((32_621, 11_659, 82_161), (1_041, 3_060, 3_060), 15),
    "cuhk03/detected": ((7_365, 1_400, 5_332), (767, 700, 700), 2),
    "cuhk03/labeled": ((7_368, 1_400, 5_328), (767, 700, 700), 2),
    "cuhk03/labeled-classic-19": (None, (1_367, 100, 100), 2),
    "duke": ((16_522, 2_228, 17_661), (702, 702, 1_110), 8),
    "mars": ((8_298, 1_980, 12_180), (625, 626, 634), 6),
    "veri": ((37_778, 1_678, 11_579), (576, 200, 200), 20),
    "vehicleid/test-13164": (None, (13_164, 13_164, 13_164), 0),
    "vehicleid/test-2400": (None, (13_164, 2_400, 2_400), 0),
    "veri-wild/test-3000": ((277_797, 3_000, 38_861), (30_671, 3_000, 3_000), None),
    "veri-wild/test-5000": ((277_797, 5_000, 64_389), (30_671, 5_000, 5_000), None),
    "veri-wild/test-10000": ((277_797, 10_000, 128_517), (30_671, 10_000, 10_000), None),
    "vric": ((54_808, 2_811, 2_811), (2_811, 2_811, 2_811), 120),
}


@pytest.mark.parametrize("name", COUNTS)
def test_official_counts(name):
    base, _, variant = name.partition("/")
    images, identities, cameras = COUNTS[name]
    for layout in DATASETS[base].variants[variant]:
        parts = ("train", "query", "gallery")
        assert (tuple(layout.images[part] for part in parts) if images else tuple(layout.images)) == (images or ())
        assert tuple(layout.identities[part] for part in parts) == identities and layout.cameras == cameras


def test_variants_have_one_full_name_each():
    assert full_names("msmt17") == ["msmt17", "msmt17/train+val"]
    assert full_names("vehicleid") == [f"vehicleid/test-{n}" for n in (800, 1600, 2400, 3200, 6000, 13164)]
    assert full_names("veri-wild") == [f"veri-wild/test-{n}" for n in (3000, 5000, 10000)]
    classic = [f"cuhk03/{boxes}-classic-{n}" for boxes in ("detected", "labeled") for n in range(20)]
    assert full_names("cuhk03") == ["cuhk03/detected", "cuhk03/labeled", *classic]


def test_a_bare_name_is_the_first_variant_and_says_so(tmp_path):
    miniature.vehicleid(tmp_path)
    miniature.veri_wild(tmp_path)
    miniature.cuhk03_np(tmp_path)
    assert load("vehicleid", tmp_path).name == "vehicleid/test-800"
    assert load("veri-wild", tmp_path).name == "veri-wild/test-3000"
    assert load("cuhk03", tmp_path) == load("cuhk03/detected", tmp_path)


def test_an_unknown_name_answers_with_the_known_ones(tmp_path):
    assert said(load, "msmt17/train+va", tmp_path) == (
        "unknown dataset 'msmt17/train'; did you mean 'msmt17/train+val'? known: msmt17, msmt17/train+val"
    )
    assert said(load, "vehicleid/test-80", tmp_path) == (
        "unknown dataset 'vehicleid/test-80'; did you mean 'vehicleid/test-800'? known: vehicleid/test-13164, "
        "vehicleid/test-1600, vehicleid/test-2400, vehicleid/test-3200, vehicleid/test-6000, vehicleid/test-800"
    )
    assert said(load, "cuhk03/label", tmp_path) == (
        "unknown dataset 'cuhk03/label'; did you mean 'cuhk03/labeled'? known: cuhk03/detected, "
        "cuhk03/detected-classic-0 ... 19, cuhk03/labeled, cuhk03/labeled-classic-0 ... 19"
    )
    assert said(load, "market/x", tmp_path) == "unknown dataset 'market/x'; did you mean 'market'? known: market"
    assert said(load, "market+vri", tmp_path).startswith("unknown dataset 'vri'; did you mean 'vric'? known: csv, cuhk03, ")
    assert said(load, "market+", tmp_path).startswith("unknown dataset ''; known: ")


@pytest.mark.parametrize("name, kind", [("msmt17", "people"), ("mars", "people"), ("vric", "vehicles")])
def test_without_a_root_the_stand_in_is_named(name, kind):
    assert said(load, name).endswith(f"; to try without files use --dataset drawn-{kind}")


def test_nowhere_names_what_was_looked_for(tmp_path):
    assert said(load, "vric", tmp_path) == (
        f"dataset 'vric' is not under {tmp_path}: looked there and in its VRIC, vric for vric_train.txt, train_images, "
        "vric_probe.txt, probe_images, vric_gallery.txt, gallery_images; "
        "give --root the folder that holds VRIC, or that folder itself"
    )
    words = said(load, "cuhk03", tmp_path / "gone")
    assert words.startswith(f"dataset 'cuhk03/detected' is not under {tmp_path / 'gone'} (no such folder): looked there")
    assert " for the folders detected/bounding_box_train, detected/query, detected/bounding_box_test or images_det" in words
    assert said(load, "folder", tmp_path / "gone") == (
        f"dataset 'folder': there is no {tmp_path / 'gone'}; give --root DIR, with the images in DIR/<identity>/ or in "
        "DIR/{train,query,gallery}/<identity>/"
    )


# ------------------------------------------------------------------------------------------------- lists as text
LISTED = {  # dataset: writer, a list, the first path it names
    "msmt17": (miniature.msmt17, "list_train.txt", "train/0000/0000_000_01_0303morning_0015_0.jpg"),
    "vehicleid": (miniature.vehicleid, "train_test_split/train_list.txt", "image/0000001.jpg"),
    "veri-wild": (miniature.veri_wild, "train_test_split/train_list.txt", "images/00003/000010.jpg"),
    "vric": (miniature.vric, "vric_train.txt", "train_images/00001.jpg"),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_list_may_be_passed_on_by_windows(name, tmp_path):
    write, file, _ = LISTED[name]
    folder = write(tmp_path)
    expected = load(name, tmp_path)
    lines = (folder / file).read_text().split("\n")
    for end, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig"), ("\r", "latin-1"), ("\n\n  \n", "utf-8")):
        (folder / file).write_bytes(end.join(line.strip() for line in lines if line.strip()).encode(encoding))
        assert load(name, tmp_path) == expected
    (folder / file).write_text((folder / file).read_text().replace("/", "\\"))
    assert load(name, tmp_path) == expected


@pytest.mark.parametrize("name", LISTED)
def test_a_damaged_or_half_copied_list(name, tmp_path):
    write, file, first = LISTED[name]
    folder = write(tmp_path)
    full = full_names(name)[0]
    good = (folder / file).read_bytes()
    count = len(good.split())
    (folder / file).write_bytes(b"\r\n" + good + b"garbage\r\n")
    words = said(load, name, tmp_path, parts=("train",))
    line = 2 + good.count(b"\n")  # the line's own number, empty lines counted
    example = DATASETS[name].variants[full.partition("/")[2]][0].example
    assert words == f"{folder / file} line {line}: 'garbage' is not like '{example}'; copy {os.path.basename(file)} again"
    report = check(name, tmp_path)
    assert report["problems"][0] == words
    assert report["splits"]["train"]["images"] == 0 < report["splits"]["gallery"]["images"]

    (folder / file).write_bytes(b"\n \n")
    needs = ", ".join(DATASETS[name].variants[full.partition("/")[2]][0].needed())
    start = f"dataset '{full}' at {folder} is incomplete: file '{file}' (train)"
    assert said(load, name, tmp_path) == f"{start} names no images; copy the whole dataset again ({needs})"
    (folder / file).unlink()
    assert said(load, name, tmp_path) == f"{start} is missing; copy the whole dataset again ({needs})"
    assert load(name, tmp_path, parts=("query", "gallery")).gallery  # the other parts do not need it

    (folder / file).write_bytes(good)
    (folder / first).unlink()
    words = said(load, name, tmp_path)
    assert f"but the first, {folder / first}, is not there; copy the images to where the list says" in words
    report = check(name, tmp_path)
    assert report["missing"] == [str(folder / first)] and report["unreadable"] == []
    assert report["problems"] == [f"1 listed files are missing, the first is {folder / first}; copy the images again"]
    assert count > 1


def test_a_train_part_alone_is_all_a_search_needs(tmp_path):
    """Nothing of the test is opened: its lists and folders may be missing."""
    for name, (write, _, _) in LISTED.items():
        folder = write(tmp_path)
        expected = load(name, tmp_path, parts=("train",))
        for path in folder.rglob("*.txt"):
            if any(word in path.name for word in ("test", "query", "gallery", "probe")):
                path.unlink()
        assert load(name, tmp_path, parts=("train",)) == expected, name
        with pytest.raises(UserError):
            load(name, tmp_path, parts=("query",))


# ------------------------------------------------------------------------------------------------- MSMT17
@pytest.mark.parametrize("edition", ["V1", "V2"])
@pytest.mark.parametrize("inside, lists", [*((f, ".") for f in msmt17.FOLDERS), ("MSMT17/MSMT17_{}", ".."), (".", ".")])
def test_msmt17_in_every_place(tmp_path, edition, inside, lists):
    inside = inside.replace("MSMT17_V1", f"MSMT17_{edition}").format(edition)
    folder = miniature.msmt17(tmp_path, edition, inside, lists)
    images = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[edition]
    splits = load("msmt17", tmp_path)
    assert seen(splits.train, folder / images[0]) == [
        ("0000/0000_000_01_0303morning_0015_0.jpg", 1, 1), ("0000/0000_001_15_0303noon_0016_0.jpg", 1, 15),
        ("0001/0001_000_03_0113afternoon_0001_1.jpg", 2, 3), ("0001/0001_001_04_0113afternoon_0002_0.jpg", 2, 4),
    ]  # fmt: skip
    query, gallery = seen(splits.query, folder / images[1]), seen(splits.gallery, folder / images[1])
    assert query == [("0000/0000_000_01_0114morning_0301_0.jpg", 10_001, 1)]  # label 0 again, another person
    assert gallery == [
        ("0000/0000_001_02_0114noon_0302_2.jpg", 10_001, 2), ("0002/0002_000_05_0114noon_0001_0_ex.jpg", 10_003, 5),
    ]  # fmt: skip
    assert (splits.protocol, splits.train_part) == ("msmt17", "train")
    assert splits.title == {"V1": "MSMT17 V1", "V2": "MSMT17 V2 (faces blurred)"}[edition]
    assert load("msmt17", folder) == splits


def test_msmt17_train_and_val_is_a_training_set_of_its_own(tmp_path):
    miniature.msmt17(tmp_path)
    alone, both = load("msmt17", tmp_path), load("msmt17/train+val", tmp_path)
    assert tags(both.train) == [*tags(alone.train), (1, 9)]
    assert (both.name, both.train_part) == ("msmt17/train+val", "train+val")
    assert (both.query, both.gallery) == (alone.query, alone.gallery)
    (tmp_path / "MSMT17_V1" / "list_val.txt").unlink()
    assert load("msmt17", tmp_path) == alone
    assert "file 'list_val.txt' (train) is missing" in said(load, "msmt17/train+val", tmp_path)


def test_msmt17_needs_the_camera_in_the_name(tmp_path):
    folder = miniature.msmt17(tmp_path)
    text(folder / "list_query.txt", ["0000/0002_c1s1_000451_03.jpg 0"])
    assert said(load, "msmt17", tmp_path) == (
        f"{folder / 'list_query.txt'} line 1: '0000/0002_c1s1_000451_03.jpg 0' is not like "
        "'0000/0000_000_01_0303morning_0015_0.jpg 0'; copy list_query.txt again"
    )


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_msmt17_names_its_edition_and_what_it_lacks(tmp_path, edition):
    folder = miniature.msmt17(tmp_path, edition)
    miniature.market(tmp_path)
    assert load("msmt17", tmp_path).edition == check("msmt17", tmp_path)["edition"] == f"MSMT17_{edition}"
    joined = load("market+msmt17", tmp_path)
    assert (joined.edition, check("market+msmt17", tmp_path)["edition"]) == (f"MSMT17_{edition}",) * 2
    assert load("market", tmp_path).edition == ""
    images = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[edition]
    for name in images:
        (folder / name).rename(folder / f"{name}.gone")
    assert f"folder '{images[0]}' (train) is missing" in said(load, "msmt17", tmp_path)  # this edition's, not V1's
    if edition == "V2":
        for name in images:
            (folder / f"{name}.gone").rename(folder / name.replace("v2", "V2"))
        assert load("msmt17", tmp_path).edition == "MSMT17_V2"


def test_msmt17_two_editions_are_not_chosen_between(tmp_path):
    one, other = miniature.msmt17(tmp_path, "V1"), miniature.msmt17(tmp_path, "V2")
    for parts in (("train",), ("query", "gallery"), ("train", "query", "gallery")):
        assert said(load, "msmt17", tmp_path, parts=parts) == (
            f"two editions with other pictures are under {tmp_path}: MSMT17_V1 in {one}, MSMT17_V2 in {other}; "
            f"give --root {one} or --root {other}, or move one of them elsewhere"
        )
    assert said(check, "msmt17/train+val", tmp_path).startswith("two editions with other pictures are under ")
    assert [load("msmt17", folder).edition for folder in (one, other)] == ["MSMT17_V1", "MSMT17_V2"]
    (other / "list_gallery.txt").unlink()
    assert load("msmt17", tmp_path).edition == "MSMT17_V1"  # the whole one
    both = miniature.msmt17(tmp_path / "mixed", "V1", "MSMT17")
    miniature.msmt17(tmp_path / "mixed", "V2", "MSMT17")
    assert said(load, "msmt17", both) == (
        f"two editions with other pictures are under {both}: MSMT17_V1 in {both}, MSMT17_V2 in {both}; move one of them "
        "elsewhere"
    )


# ------------------------------------------------------------------------------------------------- CUHK03
@pytest.mark.parametrize("inside", [*cuhk03.NP_FOLDERS, "."])
def test_cuhk03_np_folders(tmp_path, inside):
    for flavour, files in miniature.CUHK03_NP.items():
        miniature.folders(tmp_path / inside / flavour, files)
    for flavour, count in (("detected", 2), ("labeled", 3)):
        splits = load(f"cuhk03/{flavour}", tmp_path)
        directory = str(tmp_path / inside / flavour / "bounding_box_train")
        assert [os.path.dirname(s.path) for s in splits.train] == [directory] * count
        assert (tags(splits.query), tags(splits.gallery)) == ([(4, 1), (4, 2)], [(4, 1), (4, 2)])
        assert splits.protocol == "cuhk03-np"
        # --root may be the folder of either flavour: the right one is read
        for root in ("detected", "labeled"):
            assert load(f"cuhk03/{flavour}", tmp_path / inside / root) == splits


@pytest.mark.parametrize("folder", [*cuhk03.RAW_FOLDERS, "."])
@pytest.mark.parametrize("release, config", [("cuhk03_release/", ""), ("cuhk03_release/", "cuhk03_release/"), ("", "")])
def test_cuhk03_raw_new_protocol(tmp_path, folder, release, config):
    miniature.cuhk03_raw(tmp_path / "data", release, config, folder)
    for flavour, extra in (("detected", []), ("labeled", [7])):
        splits = load(f"cuhk03/{flavour}", tmp_path / "data")
        numbers = [1, 5, 6, *extra]
        found = [(os.path.basename(s.path), s.identity, s.camera) for s in splits.train]
        # labels and rows of the configuration: person (1, 2) is label 1, (2, 1) is label 2
        assert found == [
            (f"{pair}_{person:03d}_{view}_{n:02d}.png", label, view)
            for pair, person, label in ((1, 2, 1), (2, 1, 2))
            for n in numbers
            for view in [1 if n < 6 else 2]
        ]
        assert [os.path.basename(s.path) for s in splits.query] == ["1_001_1_01.png"]
        assert tags(splits.gallery) == [(3, 1 if n < 6 else 2) for n in numbers[1:]]
        assert splits.protocol == "cuhk03-np"


def test_cuhk03_raw_images_are_extracted_once_and_as_they_were(tmp_path, monkeypatch, capsys):
    miniature.cuhk03_raw(tmp_path)
    splits = load("cuhk03/labeled", tmp_path)
    assert "extracting the labeled images of " in capsys.readouterr().err
    for s in (*splits.train, *splits.query, *splits.gallery):
        assert Path(s.path).parent.parent == tmp_path / "cache"
        pair, person, _, n = (int(part) for part in Path(s.path).stem.split("_"))
        with Image.open(s.path) as picture:
            assert np.array_equal(np.asarray(picture), miniature.raw_pixels(pair, person, n))
    monkeypatch.setitem(sys.modules, "h5py", None)  # not even opened again
    assert load("cuhk03/labeled", tmp_path) == splits and capsys.readouterr().err == ""
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [Path(splits.train[0].path).parent.name]


def test_cuhk03_an_extraction_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    miniature.cuhk03_raw(tmp_path)
    honest, saved = Image.Image.save, []

    def fails(picture, *arguments, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(honest(picture, *arguments, **options))

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        load("cuhk03", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(Image.Image, "save", honest)
    assert len(load("cuhk03", tmp_path).train) == 6


def test_cuhk03_images_that_a_toolkit_has_extracted_are_used(tmp_path):
    folder = miniature.cuhk03_raw(tmp_path)
    for pair, person, n in miniature.raw_images("detected"):
        image(folder / "images_detected" / f"{pair}_{person:03d}_{1 if n < 6 else 2}_{n:02d}.png")
    assert {Path(s.path).parent for s in load("cuhk03/detected-classic-1", tmp_path).train} == {folder / "images_detected"}
    (folder / "cuhk03_release" / "cuhk-03.mat").unlink()
    assert {Path(s.path).parent for s in load("cuhk03", tmp_path).train} == {folder / "images_detected"}
    assert not (tmp_path / "cache").exists()


def test_cuhk03_classic_splits(tmp_path):
    miniature.cuhk03_raw(tmp_path)
    for split in range(20):
        tested, others = (1001, 1002) if split % 2 == 0 else (1002, 1001), [2001]
        splits = load(f"cuhk03/labeled-classic-{split}", tmp_path)
        assert tags(splits.query) == [(tested[0], 1), (tested[0], 1), (tested[0], 2), (tested[0], 2)]
        assert splits.gallery is splits.query and splits.protocol == "cuhk03-classic"
        assert sorted({s.identity for s in splits.train}) == [tested[1], *others] and len(splits.train) == 8


def test_cuhk03_with_something_missing(tmp_path, monkeypatch):
    folder = miniature.cuhk03_raw(tmp_path)
    config = folder / "cuhk03_new_protocol_config_labeled.mat"
    config.unlink()
    assert f"file '{config.name}' (train) is missing" in said(load, "cuhk03/labeled", tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    mat = folder / "cuhk03_release" / "cuhk-03.mat"
    advice = "pip install h5py scipy, or pip install '.[datasets]' in autoreid's folder"
    assert said(load, "cuhk03", tmp_path) == f"reading {mat} needs the package h5py: {advice}"
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    detected = folder / "cuhk03_new_protocol_config_detected.mat"
    assert said(load, "cuhk03", tmp_path) == f"reading {detected} needs the package scipy: {advice}"
    monkeypatch.undo()
    monkeypatch.setenv("AUTOREID_CACHE", str(tmp_path / "cache"))
    mat.write_bytes(b"no HDF5")
    assert said(load, "cuhk03", tmp_path) == f"{mat} cannot be read (OSError): it is damaged; copy it again"
    detected.write_bytes(b"no MATLAB file, but as long as one" * 10)
    assert f"{detected} cannot be read (" in said(load, "cuhk03", tmp_path)


@pytest.fixture
def cuhk03_config(tmp_path):
    """A function that changes variables of the detected configuration; the copy it belongs to is in tmp_path."""
    from scipy.io import loadmat, savemat

    path = miniature.cuhk03_raw(tmp_path) / "cuhk03_new_protocol_config_detected.mat"
    original = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}

    def change(**variables):
        savemat(path, {**original, **variables})
        return path

    change.original = original
    return change


def test_cuhk03_numbers_may_be_matlabs_doubles(tmp_path, cuhk03_config):
    expected = load("cuhk03", tmp_path)
    whole = ("train_idx", "query_idx", "gallery_idx", "labels")
    cuhk03_config(**{name: cuhk03_config.original[name].astype(float) for name in whole})
    assert load("cuhk03", tmp_path) == expected
    for name, wrong in (("train_idx", [1.5]), ("labels", [np.nan] * 9), ("train_idx", ["x"])):
        path = cuhk03_config(**{name: np.array([wrong])})
        words = f"{path}: variable {name} must hold whole numbers and does not; copy the original file again"
        assert said(load, "cuhk03", tmp_path) == words
        assert check("cuhk03", tmp_path)["problems"].count(words) == 1


def test_cuhk03_an_empty_cell_of_names(tmp_path, cuhk03_config):
    names = cuhk03_config.original["filelist"].copy()
    row = int(cuhk03_config.original["train_idx"].flatten()[0])
    names[row - 1, 0] = np.array([], dtype="U1")
    path = cuhk03_config(filelist=names)
    assert said(load, "cuhk03", tmp_path) == f"{path} names '', which is not like 1_001_1_01.png; copy it again"


@pytest.mark.parametrize("stored", ["numbers", "text", "group", "references to nothing", "grey images"])
def test_cuhk03_raw_file_that_is_laid_out_otherwise(tmp_path, stored):
    import h5py

    mat = miniature.cuhk03_raw(tmp_path) / "cuhk03_release" / "cuhk-03.mat"
    with h5py.File(mat, "r+") as file:
        for name in ("detected", "testsets"):
            if stored == "grey images":
                grey = file.create_dataset("grey", data=np.ones((2, 4, 6), np.uint8))
                file[file["detected"][()].ravel()[0]][0, 0] = grey.ref
                break
            del file[name]
            if stored == "group":
                file.create_group(name)
            else:
                data = {"numbers": np.arange(5), "text": "none"}.get(stored, np.empty((1, 5), h5py.ref_dtype))
                file.create_dataset(name, data=data)
    words = said(load, "cuhk03", tmp_path)
    assert f"of {mat} is not laid out as in CUHK03's cuhk-03.mat (" in words and words.endswith("); copy the original file")
    assert list((tmp_path / "cache").iterdir()) == []
    if stored != "grey images":
        assert f"'testsets' of {mat} is not laid out" in said(load, "cuhk03/detected-classic-3", tmp_path)


# ------------------------------------------------------------------------------------------------- vehicles
@pytest.mark.parametrize("folder", [*vehicleid.FOLDERS, "."])
def test_vehicleid_has_no_cameras_and_one_test_list(tmp_path, folder):
    folder = miniature.vehicleid(tmp_path, folder)
    for size in (800, 1600, 2400, 3200, 6000, 13164):
        splits = load(f"vehicleid/test-{size}", tmp_path)
        assert seen(splits.train, folder / "image") == [
            ("0000001.jpg", 1, 0), ("0000002.jpg", 1, 0), ("0000101.jpg", 8, 0), ("0000102.jpg", 8, 0),
        ]  # fmt: skip
        assert tags(splits.query) == [(4, 0)] * 3 + [(10, 0)] * 2
        assert splits.gallery is splits.query and splits.protocol == f"vehicleid/test-{size}"
    assert load("vehicleid", tmp_path, parts=("gallery", "query")).gallery == splits.gallery
    text(folder / "train_test_split" / "test_list_1600.txt", ["0000001 0", "0000002 0"])
    assert tags(load("vehicleid/test-1600", tmp_path).query) == [(1, 0)] * 2  # its own list, and no other
    assert check("vehicleid/test-1600", tmp_path)["problems"] == [
        "1 identity is in train and in the test, the first is 0: their scores would be too good; "
        "take them out of one of the two",
        f"2 files are in two parts, the first is {folder / 'image' / '0000001.jpg'} (train and gallery); list each in one "
        "part",
    ]


def test_vehicleid_with_nobody_who_could_ask(tmp_path):
    folder = miniature.vehicleid(tmp_path)
    text(folder / "train_test_split" / "test_list_800.txt", ["0000201 3", "0000301 9"])
    report = check("vehicleid", tmp_path)
    assert report["unmatched_queries"] == 2 and report["problems"] == [
        "none of the 2 identities of the test list has a second image, so that nobody can ask and nothing can be scored; "
        "copy the list again"
    ]
    text(folder / "train_test_split" / "test_list_800.txt", ["0000201 3", "0000202 3", "0000301 9"])
    assert check("vehicleid", tmp_path)["problems"] == []


def test_numbers_beyond_64_bits(tmp_path):
    folder = miniature.vric(tmp_path)
    text(folder / "vric_probe.txt", [f"00001.jpg 2 {2**63}"])
    words = (
        f"dataset 'vric' at {folder}: {folder / 'probe_images' / '00001.jpg'} (query) has identity 3 and camera {2**63}, "
        "and numbers must be below 2^63; renumber them"
    )
    assert said(load, "vric", tmp_path) == words
    assert words in check("vric", tmp_path)["problems"]


def test_nobody_asks_for_distractors(tmp_path):
    """0000 matches nothing, other 0000 neither."""
    folder = miniature.market(tmp_path)
    for name in ("0000_c2s1_000001_01.jpg", "-1_c2s1_000001_01.jpg"):
        image(folder / "query" / name)
    splits = load("market", tmp_path)
    assert tags(splits.query) == [(1, 1), (3, 6)] and (0, 1) in tags(splits.gallery)
    report = check("market", tmp_path)
    assert report["unmatched_queries"] == 0 and report["problems"] == [
        "query: 2 images have identity -1 or 0000 and are left out; number identities from 0001"
    ]
    for name in ("0001_c1s1_000151_00.jpg", "0003_c6s1_000151_00.jpg"):
        (folder / "query" / name).unlink()
    assert said(load, "market", tmp_path) == (
        f"dataset 'market' at {folder}: all 2 images of query have identity -1 or 0000, which are nobody; number "
        "identities from 0001"
    )


@pytest.mark.parametrize("name, path, kind", [
    ("market", "bounding_box_train", "folder"), ("vehicleid/test-800", "train_test_split/train_list.txt", "file"),
    ("msmt17", "train", "folder"), ("mars", "info/train_name.txt", "file"),
])  # fmt: skip
def test_a_file_where_a_folder_should_be(tmp_path, name, path, kind):
    folder = WRITERS[name](tmp_path)
    (folder / path).rename(folder / "gone")
    (folder / path).touch() if kind == "folder" else (folder / path).mkdir()
    start = f"dataset '{name}' at {folder} is incomplete: {kind} '{path}' (train) is no {kind}; copy the whole dataset"
    assert said(load, name, tmp_path).startswith(start)
    assert [line for line in check(name, tmp_path)["problems"] if line.startswith(start)]


@pytest.mark.parametrize("name, path", [
    ("veri-wild/test-3000", "train_test_split/vehicle_info.txt"),
    ("cuhk03/detected", "cuhk03_new_protocol_config_detected.mat"),
])  # fmt: skip
def test_what_all_parts_lack_is_said_once(tmp_path, name, path):
    folder = miniature.cuhk03_raw(tmp_path) if name.startswith("cuhk03") else miniature.veri_wild(tmp_path)
    damaged = (folder / path).read_bytes()[:99].replace(b";", b" ")
    (folder / path).unlink()
    [line] = check(name, tmp_path)["problems"]
    assert line.startswith(
        f"dataset '{name}' at {folder} is incomplete: file '{path}' (train, query, gallery) is missing; copy the whole"
    )
    (folder / path).write_bytes(damaged)
    assert len(check(name, tmp_path)["problems"]) == 1


@pytest.mark.parametrize("name, inside", [
    ("market", "Market-1501-v15.09.15/Market-1501-v15.09.15"), ("msmt17", "MSMT17_V2/MSMT17_V2"),
    ("msmt17", "msmt17/MSMT17_V2/MSMT17_V2"), ("veri", "veri_776"), ("veri", "VeRi_776/VeRi_776"),
    ("vehicleid/test-800", "VehicleID_V1.0/VehicleID_V1.0"), ("mars", "MARS/MARS"),
])  # fmt: skip
def test_an_archive_unpacked_into_a_folder_of_its_own(tmp_path, name, inside):
    folder = miniature.msmt17(tmp_path / "x", "V2") if name == "msmt17" else WRITERS[name](tmp_path / "x")
    (tmp_path / "data" / inside).parent.mkdir(parents=True)
    folder.rename(tmp_path / "data" / inside)
    expected = load(name, tmp_path / "data" / inside)
    assert load(name, tmp_path / "data") == load(name, (tmp_path / "data" / inside).parent) == expected


@pytest.mark.parametrize("folder", [*veri_wild.FOLDERS, "."])
@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_veri_wild_takes_cameras_from_its_table(tmp_path, folder, ending):
    folder = miniature.veri_wild(tmp_path, folder, ending)
    for size in (3000, 5000, 10000):
        splits = load(f"veri-wild/test-{size}", tmp_path)
        assert seen(splits.train, folder / "images") == [("00003/000010.jpg", 4, 1), ("00003/000011.jpg", 4, 2)]
        assert seen(splits.query, folder / "images") == [("00001/000001.jpg", 2, 52)]
        assert tags(splits.gallery) == [(2, 52), (2, 174), (3, 7)]
        assert splits.protocol == "veri-wild"


def test_veri_wild_damaged_table(tmp_path):
    folder = miniature.veri_wild(tmp_path)
    info = folder / "train_test_split" / "vehicle_info.txt"
    rows = info.read_bytes()
    os.utime(info, ns=(1, 1))
    load("veri-wild", tmp_path)
    info.write_bytes(b"\r\n".join(line for line in rows.split(b"\r\n") if not line.startswith(b"00002/000004")))
    assert said(load, "veri-wild", tmp_path) == (
        f"{folder / 'train_test_split' / 'test_3000.txt'} names 00002/000004, of which {info} does not say the camera; "
        "copy both lists again"
    )
    info.write_bytes(rows + b"00009/000001;;2018\r\n")
    os.utime(info, ns=(2, 2))
    assert f"{info} line 8: '00009/000001;;2018' is not like '00001/000001;52;2018-03-" in said(load, "veri-wild", tmp_path)


@pytest.mark.parametrize("folder", ["VRIC", "vric", "."])
def test_vric(tmp_path, folder):
    folder = miniature.vric(tmp_path, folder)
    splits = load("vric", tmp_path)
    assert seen(splits.train, folder / "train_images") == [
        ("00001.jpg", 1, 3), ("00002.jpg", 1, 40), ("00003.jpg", 6, 3), ("00004.jpg", 6, 119),
    ]  # fmt: skip
    assert (tags(splits.query), tags(splits.gallery)) == ([(3, 8), (4, 9)], [(3, 10), (4, 11)])
    assert splits.protocol == "vric"


def test_the_veri_oracle_and_the_rule_are_one(tmp_path):
    folder = miniature.veri(tmp_path)
    oracle = veri_oracle(folder)
    splits = load("veri", tmp_path)
    by_name = {side: {os.path.basename(s.path): s for s in getattr(splits, side)} for side in ("query", "gallery")}
    good, junk = [], []
    for q, query in enumerate(oracle.queries, start=1):
        for g, name in enumerate(oracle.gallery, start=1):
            one, other = by_name["query"][query], by_name["gallery"][name]
            if one.identity == other.identity:
                (junk if one.camera == other.camera else good).append((q, g))
    assert (oracle.good, oracle.junk) == (good, junk) == ([(1, 3), (2, 4), (2, 6)], [(1, 1), (1, 2), (2, 5)])
    (folder / "name_query.txt").unlink()  # sorted names stand in
    assert veri_oracle(folder) == oracle
    (folder / "gt_index.txt").write_text("3 \n4 \n")
    assert check("veri", tmp_path)["problems"] == [
        "gt_index.txt: 1 of its 2 pairs are not those of the rule 'same identity, same camera is left out'; "
        "copy the lists and the images from one archive"
    ]
    (folder / "gt_index.txt").write_text("\n\n\n")  # nobody has a match: an empty line is a query
    assert veri_oracle(folder).good == []
    for wrong, lines in (("3", 1), ("3\n4\n5\n", 3), ("3\n4 7\n", 2), ("3\n4 x\n", 2), ("3\n4 0\n", 2)):
        (folder / "gt_index.txt").write_text(wrong)
        assert said(veri_oracle, folder) == (
            f"{folder / 'gt_index.txt'} has {lines} lines and must have 2, one per query, each with rows from 1 to 6 of "
            "name_test.txt; copy it again"
        )
    assert "gt_index.txt has 2 lines" in check("veri", tmp_path)["problems"][0]
    (folder / "gt_index.txt").unlink()
    assert veri_oracle(folder) is None and check("veri", tmp_path)["problems"] == []


# ------------------------------------------------------------------------------------------------- people
@pytest.mark.parametrize("folder", ["MARS", "mars", "."])
def test_mars_tracklets(tmp_path, folder):
    folder = miniature.mars(tmp_path, folder)
    splits = load("mars", tmp_path)
    first = folder / "bbox_train" / "0001"
    assert splits.train[0] == Sample(
        str(first / "0001C1T0001F001.jpg"), 1, 1, (str(first / "0001C1T0001F001.jpg"), str(first / "0001C1T0001F002.jpg"))
    )
    assert [len(s.frames) for s in splits.train] == [2, 3]
    assert tags(splits.query) == [(2, 1), (4, 6)]  # rows 3 and 5, from 1
    assert tags(splits.gallery) == [(0, 3), (2, 1), (2, 5), (4, 6), (4, 2)]  # the asking tracks too, no junk
    assert set(splits.query) <= set(splits.gallery)
    assert (splits.protocol, splits.junk) == ("mars", 1)
    assert all(s.path == s.frames[0] and all(map(os.path.isfile, s.frames)) for s in splits.gallery)
    report = check("mars", tmp_path)
    assert report["differs"][0] == "train: 2 tracklets, officially 8,298"
    (first / "0001C1T0001F002.jpg").write_bytes(b"broken")  # a later frame
    assert check("mars", tmp_path)["unreadable"] == [str(first / "0001C1T0001F002.jpg")]


def test_mars_lists_that_do_not_fit(tmp_path):
    from scipy.io import savemat

    folder = miniature.mars(tmp_path)
    info = folder / "info"
    text(info / "train_name.txt", ["0001C1T0001F001.jpg"])
    assert said(load, "mars", tmp_path) == (
        f"{info / 'tracks_train_info.mat'} row 1 is frames 1 to 2 of 1 in the list of names; copy info/ again"
    )
    savemat(info / "query_IDX.mat", {"query_IDX": np.array([[3, 7]])})
    assert said(load, "mars", tmp_path, parts=("query",)) == (
        f"{info / 'query_IDX.mat'} names tracklets beyond the 6 of info/tracks_test_info.mat; copy info/ again"
    )
    savemat(info / "query_IDX.mat", {"other": np.array([[3]])})
    assert said(load, "mars", tmp_path, parts=("query",)) == (
        f"{info / 'query_IDX.mat'} holds no variable query_IDX (it holds other); copy the original file again"
    )


@pytest.mark.parametrize("rows, words", [
    (np.ones((2, 5), int), "{} is a table of 2 x 5 and must have 4 columns (first frame, last frame, identity, camera); "
     "copy info/ again"),
    (np.array([[1, 2, 1, np.nan]]), "{}: variable track_train_info must hold whole numbers and does not; copy the original "
     "file again"),
    (np.array([["a", "b", "c", "d"]]), "{}: variable track_train_info must hold whole numbers and does not; copy the "
     "original file again"),
])  # fmt: skip
def test_mars_rows_that_are_no_tracklets(tmp_path, rows, words):
    from scipy.io import savemat

    path = miniature.mars(tmp_path) / "info" / "tracks_train_info.mat"
    savemat(path, {"track_train_info": rows})
    assert said(load, "mars", tmp_path) == words.format(path)
    savemat(path, {"track_train_info": np.array([[1.0, 2.0, 1.0, 1.0]])})  # doubles
    assert len(load("mars", tmp_path).train[0].frames) == 2


@pytest.mark.parametrize("inside", [*duke.FOLDERS, "."])
def test_duke_reads_the_copy_and_says_once_that_it_was_withdrawn(tmp_path, inside, monkeypatch, capsys):
    monkeypatch.setattr(locate, "_SAID", set())
    miniature.folders(tmp_path / inside, miniature.DUKE)
    splits = load("duke", tmp_path)
    assert tags(splits.train) == [(1, 2), (1, 8)] and tags(splits.gallery) == [(5, 1), (5, 2), (6, 3)]
    assert splits.protocol == "market1501"
    load("duke", tmp_path), check("duke", tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "withdrawn by their authors" in err and "without their consent" in err and "downloads nothing" in err


@pytest.mark.parametrize("images", ["images", "../images", "distractors_500k/images", "../distractors_500k/images"])
def test_market_500k_adds_distractors_whatever_their_names(tmp_path, images):
    folder = miniature.market_500k(tmp_path, images)
    plain, more = load("market", tmp_path), load("market+500k", tmp_path)
    assert more.gallery[: len(plain.gallery)] == plain.gallery
    place = Path(os.path.normpath(folder / images))
    assert seen(more.gallery[len(plain.gallery) :], place) == [("00000001.jpg", 0, 0), ("0000_c3s1_000001_00.jpg", 0, 3)]
    assert (more.train, more.query, more.protocol, more.name) == (plain.train, plain.query, "market1501", "market+500k")


def test_market_500k_one_folder_down_is_not_plain_market(tmp_path):
    folder = miniature.market_500k(tmp_path)
    (folder / "images").rename(folder / "inner")
    (folder / "images").mkdir()
    (folder / "inner").rename(folder / "images" / "images")
    words = f"{folder / 'images'} holds no images; move the distractors' images into it, not one folder down"
    assert said(load, "market+500k", tmp_path) == words and words in check("market+500k", tmp_path)["problems"]


# ------------------------------------------------------------------------------------------------- own images
def test_own_folder_deals_identities_and_who_asks(tmp_path):
    miniature.own_folder(tmp_path)
    splits = load("folder", tmp_path)
    assert seen(splits.train, tmp_path) == [
        *((f"anna/anna_c{c}_{n}.jpg", 1, c) for n, c in enumerate((1, 1, 2))),
        *((f"carl/carl_c{c}_{n}.jpg", 3, c) for n, c in enumerate((1, 1, 2))),
    ]
    # the only image by camera 2 answers: asking, it would leave camera 1's query without a match
    assert seen(splits.query, tmp_path) == [("bert/bert_c1_0.jpg", 2, 1), ("dora/dora_c1_0.jpg", 4, 1)]
    assert tags(splits.gallery) == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert (splits.protocol, splits.junk, splits.name) == ("market1501", 1, "folder")


def test_own_folder_every_query_has_a_match_whatever_the_cameras(tmp_path):
    rng = np.random.default_rng(0)
    for person in range(40):
        for shot in range(rng.integers(1, 6)):
            image(tmp_path / f"p{person:02d}" / f"x_c{rng.integers(1, 4)}_{shot}.jpg")
    splits = load("folder", tmp_path)
    assert len(splits.query) > 10
    for s in splits.query:
        assert any(g.identity == s.identity and g.camera != s.camera for g in splits.gallery)
    tested = {s.identity for s in (*splits.query, *splits.gallery)}
    assert tested == set(range(2, 41, 2)) and {s.identity for s in splits.train} == set(range(1, 41, 2))
    assert not set(splits.query) & set(splits.gallery)


def test_own_folder_without_cameras_is_plain(tmp_path):
    miniature.own_folder(tmp_path, cameras=False)
    splits = load("folder", tmp_path)
    assert splits.protocol == "plain" and {s.camera for s in (*splits.train, *splits.query, *splits.gallery)} == {0}
    assert [os.path.basename(s.path) for s in splits.query] == ["bert-0.jpg", "dora-0.jpg"]
    assert tags(splits.gallery) == [(2, 0)] * 2 + [(4, 0)] * 2
    (tmp_path / "bert" / "bert-0.jpg").rename(tmp_path / "bert" / "bert_c1_0.jpg")
    assert load("folder", tmp_path).protocol == "plain"
    assert check("folder", tmp_path)["problems"] == [
        "12 of 13 file names have no camera (_c and a number), the first is 'bad.jpg': cameras are ignored where any is "
        f"missing; rename them, or give a pattern in {tmp_path / 'autoreid.json'}"
    ]


def test_own_folder_with_a_pattern_of_its_own(tmp_path):
    for name in ("a", "b"):
        for shot, place in enumerate(("gate07", "gate12", "gate07")):
            image(tmp_path / name / f"{place}-{shot}.jpg")
    settings = tmp_path / "autoreid.json"
    settings.write_text(json.dumps({"camera": r"gate(\d+)"}))
    splits = load("folder", tmp_path)
    assert tags(splits.train) == [(1, 7), (1, 7), (1, 12)] and splits.protocol == "market1501"
    image(tmp_path / "a" / "roof-9.jpg")
    assert load("folder", tmp_path) == splits
    assert check("folder", tmp_path)["problems"] == [
        "train: 1 images are not named like 17_c3_001.jpg and are ignored, the first is 'a/roof-9.jpg'; "
        "rename or remove them"
    ]
    for pattern, words in {
        "gate": "the camera pattern has 0 groups and must have one, around the camera",
        r"(gate)(\d+)": "the camera pattern has 2 groups and must have one, around the camera",
        "(": "camera is no regular expression (missing ), unterminated subpattern at position 0); such as "
        r'{"camera": "cam(\\d+)"}',
        r"gate(x?)\d": "in 'gate07-0.jpg' the pattern's group is empty; put it around the camera",
        r"door(\d+)": r"the camera pattern 'door(\d+)' fits none of 4 file names, the first is 'gate07-0.jpg'; mend the "
        "pattern, or delete the file to go without cameras",
    }.items():
        settings.write_text(json.dumps({"camera": pattern}))
        assert said(load, "folder", tmp_path) == f"{settings}: {words}"
    settings.write_text('{"cameras": "x"}')
    known = "did you mean 'camera'? known: camera"
    assert said(load, "folder", tmp_path) == f"unknown setting in {settings} 'cameras'; {known}"
    settings.write_text("[]")
    assert said(load, "folder", tmp_path).startswith(f"{settings} must be an object such as ")
    settings.write_text("{")
    assert said(load, "folder", tmp_path).startswith(f"{settings}: not valid JSON")
    settings.write_text(r'{"camera": "gate(\d+)"}')  # as the pattern is spelled elsewhere
    words = said(load, "folder", tmp_path)
    assert words.endswith(r'; such as {"camera": "cam(\\d+)"}, where every backslash is written twice')
    settings.write_bytes(b"\xef\xbb\xbf" + json.dumps({"camera": r"gate(\d+)"}).encode())  # Notepad's
    assert load("folder", tmp_path) == splits


def test_own_folder_in_three_parts(tmp_path):
    for part, names in {"train": "qa", "query": "b", "gallery": "bc"}.items():
        for name in names:
            image(tmp_path / part / name / f"1_c{3 if part == 'query' else 4}.jpg")
            image(tmp_path / part / name / f"2_c{3 if part == 'query' else 4}.jpg")
        miniature.mess(tmp_path / part)
    image(tmp_path / "gallery" / "-1" / "1_c1.jpg")
    splits = load("folder", tmp_path)
    assert tags(splits.train) == [(1, 4)] * 2 + [(2, 4)] * 2  # a, q: the names of train first
    assert tags(splits.query) == [(3, 3)] * 2 and tags(splits.gallery) == [(3, 4)] * 2 + [(4, 4)] * 2
    assert (splits.protocol, splits.junk) == ("market1501", 1)
    report = check("folder", tmp_path)
    assert report["problems"] == [] and report["splits"]["gallery"]["junk"] == 1
    (tmp_path / "query").rename(tmp_path / "elsewhere")
    assert load("folder", tmp_path, parts=("train",)).train == splits.train
    assert said(load, "folder", tmp_path) == (
        f"dataset 'folder' at {tmp_path}: there is no folder 'query'; give train, query, gallery with one folder per "
        "identity each, or one folder per identity and none of the three"
    )
    (tmp_path / "query").mkdir()
    image(tmp_path / "query" / "loose.jpg")
    assert said(load, "folder", tmp_path) == (
        f"dataset 'folder' at {tmp_path}: folder 'query' holds no images in a folder per identity; "
        "move them to query/<identity>/"
    )


def test_own_folder_parts_in_capitals_and_by_other_names(tmp_path):
    for part in ("train", "query", "gallery"):
        for name in ("a", "b"):
            for shot in range(2):
                folder = tmp_path / part / (name if part != "train" else f"{name}x")
                image(folder / f"{shot}_c{1 + (part == 'query')}.jpg")
    before = load("folder", tmp_path)
    for part in ("train", "query", "gallery"):
        (tmp_path / part).rename(tmp_path / part.capitalize())
    splits = load("folder", tmp_path)
    for part in ("train", "query", "gallery"):
        assert seen(getattr(splits, part), tmp_path / part.capitalize()) == seen(getattr(before, part), tmp_path / part)
    assert check("folder", tmp_path)["problems"] == []
    (tmp_path / "Query").rename(tmp_path / "Probe")
    assert said(load, "folder", tmp_path) == (
        f"dataset 'folder' at {tmp_path}: there is no folder 'query' (rename 'Probe'?); give train, query, gallery with "
        "one folder per identity each, or one folder per identity and none of the three"
    )
    (tmp_path / "Train").rename(tmp_path / "training")
    words = (
        f"dataset 'folder' at {tmp_path}: these hold folders, as parts do and identities do not: Gallery, Probe, training; "
        "the parts are train, query, gallery: rename Gallery to gallery, Probe to query, training to train"
    )
    assert said(load, "folder", tmp_path) == words
    assert check("folder", tmp_path)["problems"] == [words]


def test_own_folder_cameras_by_name_and_counted_from_0(tmp_path):
    for name in "abcd":
        for shot, place in enumerate(("north", "south", "north")):
            image(tmp_path / "words" / name / f"{place}-{shot}.jpg")
        for shot, camera in enumerate((0, 1, 0)):
            image(tmp_path / "zero" / name / f"x_c{camera}_{shot}.jpg")
            image(tmp_path / "one" / name / f"x_c{camera + 1}_{shot}.jpg")
    (tmp_path / "words" / "autoreid.json").write_text(json.dumps({"camera": "(north|south)"}))
    found = {place: load("folder", tmp_path / place) for place in ("words", "zero", "one")}
    for splits in found.values():
        assert [tags(part) for part in (splits.train, splits.query, splits.gallery)] == [
            [(1, 1), (1, 1), (1, 2), (3, 1), (3, 1), (3, 2)], [(2, 1), (4, 1)], [(2, 1), (2, 2), (4, 1), (4, 2)]
        ]  # fmt: skip
        assert splits.protocol == "market1501"
    notes = {place: check("folder", tmp_path / place)["notes"] for place in found}
    line = "cameras count from 0 and are all moved up by one, as 0 stands for no camera: camera 0 is 1 here"
    assert notes == {"words": [], "zero": [line], "one": []}
    assert f"note: {line}" in describe(check("folder", tmp_path / "zero"))


def test_own_folder_query_and_gallery_number_their_cameras_together(tmp_path):
    for part, camera in (("train", 1), ("train", 2), ("query", 1), ("gallery", 0), ("gallery", 1)):
        image(tmp_path / part / ("a" if part == "train" else "b") / f"x_c{camera}.jpg")
    splits = load("folder", tmp_path)
    assert [tags(part) for part in (splits.query, splits.gallery)] == [[(2, 2)], [(2, 1), (2, 2)]]
    assert load("folder", tmp_path, parts=("query",)).query == splits.query
    assert tags(splits.train) == [(1, 1), (1, 2)]  # a search lists nothing of the test


def test_own_folder_says_what_it_does_not_read(tmp_path):
    miniature.own_folder(tmp_path)
    assert len(load("folder", tmp_path).train) == 6
    (tmp_path / "anna" / "anna_c2_7.webp").write_bytes(miniature.jpeg(kind="WEBP"))
    assert len(load("folder", tmp_path).train) == 7  # read as any other
    assert check("folder", tmp_path)["problems"] == []
    image(tmp_path / "loose.jpg")
    image(tmp_path / "anna" / "night" / "anna_c1_8.jpg")
    image(tmp_path / "bert" / "bert_c1_9.TIFF")
    image(tmp_path / "outer" / "inner" / "x_c1_1.jpg")
    (tmp_path / "zoe").mkdir()
    assert check("folder", tmp_path)["problems"] == [
        f"not read: images beside the folders of identities, 1 in all, the first is {tmp_path / 'loose.jpg'}; move each "
        "into its identity's folder",
        f"not read: folders inside an identity's folder, 2 in all, the first is {tmp_path / 'anna' / 'night'}; move their "
        "images up",
        "not read: pictures that are no .jpg, .png, .bmp or .webp, 1 in all, the first is "
        f"{tmp_path / 'bert' / 'bert_c1_9.TIFF'}; save them as one of these",
        f"not read: folders of identities without any image, 1 in all, the first is {tmp_path / 'zoe'}; fill or remove "
        "them",
    ]
    for part in ("train", "query", "gallery", "val"):
        for shot in range(2):
            image(tmp_path / "parts" / part / f"{part == 'train'}" / f"{shot}_c{1 + (part == 'query')}.jpg")
    assert check("folder", tmp_path / "parts")["problems"] == [
        f"not read: folders beside the parts, 1 in all, the first is {tmp_path / 'parts' / 'val'}; the parts are train, "
        "query, gallery"
    ]


def test_own_folder_that_is_a_file(tmp_path):
    (tmp_path / "list.csv").touch()
    words = (
        f"dataset 'folder': {tmp_path / 'list.csv'} is a file; give --root DIR, with the images in DIR/<identity>/ or in "
        "DIR/{train,query,gallery}/<identity>/ (for a list take dataset 'csv')"
    )
    assert said(load, "folder", tmp_path / "list.csv") == words
    assert check("folder", tmp_path / "list.csv")["problems"] == [words]


def test_a_picture_too_large_to_decode_is_named(tmp_path):
    """Pillow calls it a bomb, and that is no OSError."""
    miniature.own_folder(tmp_path)
    bomb = tmp_path / "anna" / "anna_c1_0.jpg"
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert check("folder", tmp_path)["unreadable"] == [str(bomb)]


def test_own_folder_with_nobody_to_test(tmp_path):
    image(tmp_path / "loose.jpg")
    assert said(load, "folder", tmp_path) == (
        f"dataset 'folder' at {tmp_path} has 0 folders of identities and needs at least 2: one half trains, one tests; "
        f"put each identity's images into {tmp_path}/<identity>/"
    )
    assert len(check("folder", tmp_path)["problems"]) == 1  # of three parts
    for name in "ab":
        image(tmp_path / name / "1.jpg")
    assert said(load, "folder", tmp_path) == (
        f"dataset 'folder' at {tmp_path} has no query images among its 1 test identities (every second folder tests): "
        "each needs two images, by two cameras where there are cameras"
    )


def test_one_camera_for_all_gets_the_message_that_says_so(tmp_path):
    for name in "abcd":
        for shot in range(2):
            image(tmp_path / name / f"x_c1_{shot}.jpg")
    assert check("folder", tmp_path)["problems"] == [
        "every gallery image has camera 1: 2 of 2 queries have no match by another camera and will not be scored; "
        "give the true cameras, or use --protocol plain"
    ]


def test_own_csv(tmp_path):
    for delimiter in ",;\t":
        file = miniature.own_csv(tmp_path / str(ord(delimiter)), delimiter)
        splits = load("csv", file)
        assert seen(splits.train, file.parent) == [("a/1.jpg", 1, 1), ("a/2.jpg", 1, 2)]
        assert (tags(splits.query), tags(splits.gallery)) == ([(2, 1)], [(2, 2)])  # identity "0" is somebody
        assert (splits.protocol, splits.junk) == ("market1501", 1)
        assert load("csv", file.parent) == splits
    assert load("csv", miniature.own_csv(tmp_path / "plain", cameras=False)).protocol == "plain"
    (tmp_path / "plain" / "second.csv").touch()
    assert said(load, "csv", tmp_path / "plain") == (
        f"dataset 'csv': {tmp_path / 'plain'} holds 2 .csv files (list.csv, second.csv); give --root the file itself"
    )
    gone = tmp_path / "none"
    assert said(load, "csv", gone).startswith(f"dataset 'csv': there is no {gone}; give --root FILE.csv with the columns")


def csv_file(folder: Path, *rows: str, header: str = "Path,Identity,Camera,Split") -> Path:
    (folder / "list.csv").write_text("\n".join([header, *rows]))
    for row in rows:
        if row.partition(",")[0]:
            image(folder / row.partition(",")[0])
    return folder / "list.csv"


def test_own_csv_mistakes(tmp_path):
    rows = ["1.jpg,a,1,train", "2.jpg,b,1,query", "3.jpg,b,2,gallery"]
    assert tags(load("csv", csv_file(tmp_path, *rows)).gallery) == [(2, 2)]
    file = csv_file(tmp_path, *rows, header="path,identity,camera,part")
    assert said(load, "csv", file) == (
        f"{file} has no column 'split' (is it 'part'?), its first line is 'path,identity,camera,part'; the first line must "
        "name path, identity, split and, if known, camera"
    )
    csv_file(tmp_path, *rows, "", "4.jpg,b,1,test")
    assert said(load, "csv", file) == (
        f"unknown split in {file} line 6: 'test'; did you mean 'gallery'? known: train, query, gallery"
    )
    csv_file(tmp_path, *rows, "4.jpg,,1,train")
    assert said(load, "csv", file) == f"{file} line 5: identity is empty; fill it in or delete the line"
    csv_file(tmp_path, *rows, "4.jpg,b,,gallery")
    assert said(load, "csv", file) == (
        f"{file} line 5: camera is empty, but other rows have one; fill it in, or empty the column"
    )
    csv_file(tmp_path, *rows[:2])
    assert said(load, "csv", file) == f"{file} has no row with split gallery; mark the images of that part"
    csv_file(tmp_path, *rows)
    (tmp_path / "1.jpg").unlink()
    assert f"train names 1 images, but the first, {tmp_path / '1.jpg'}, is not there" in said(load, "csv", file)


def test_own_csv_cameras_counted_from_0(tmp_path):
    """0 is a camera like any other; without this the protocol would silently be plain."""
    rows = ["1.jpg,a,{0},train", "2.jpg,a,{1},train", "3.jpg,b,{0},query", "4.jpg,b,{1},gallery", "5.jpg,b,{0},gallery"]
    found = []
    for cameras in ((0, 1), (1, 2), ("00", "01"), ("gate", "roof"), ("²", "³"), (0, 10**30)):
        found.append(load("csv", csv_file(tmp_path, *(row.format(*cameras) for row in rows))))
        assert check("csv", tmp_path)["problems"] == []
    assert all(splits == found[0] for splits in found) and found[0].protocol == "market1501"
    assert tags(found[0].gallery) == [(2, 2), (2, 1)]
    splits = load("csv", csv_file(tmp_path, *(row.format(7, 0) for row in rows)))
    assert tags(splits.gallery) == [(2, 1), (2, 8)]
    assert check("csv", tmp_path)["notes"] == [
        "cameras count from 0 and are all moved up by one, as 0 stands for no camera: camera 0 is 1 here"
    ]


def test_own_csv_columns_that_are_not_read(tmp_path):
    rows = ["1.jpg,a,1,train,noon", "4.jpg,a,1,train,noon", "2.jpg,b,1,query,", "3.jpg,b,2,gallery,noon"]
    file = csv_file(tmp_path, *rows, header="path,identity,camera,split,daytime")
    report = check("csv", file)
    assert report["problems"] == [] and report["notes"] == ["columns that are not read: daytime"]
    for name in ("cam", "CamID", "cam_id", "camera_id", "cameras", "camra"):
        file = csv_file(tmp_path, *rows, header=f"path,identity,{name},split,daytime")
        assert said(load, "csv", file) == (
            f"{file} has no column 'camera' but one that is called '{name.lower()}'; call it 'camera', or remove it to go "
            "without cameras"
        )
        assert len(check("csv", file)["problems"]) == 1
    for name in ("name", "time", "campaign", "place"):  # nothing like it
        assert load("csv", csv_file(tmp_path, *rows, header=f"path,identity,{name},split,daytime")).protocol == "plain"
    file = csv_file(tmp_path, *rows, header="file,pid,camera,split,daytime")
    assert f"{file} has no column 'path' (is it 'file'?)" in said(load, "csv", file)


def test_own_csv_as_excel_writes_it(tmp_path):
    file = miniature.own_csv(tmp_path)
    expected, plain = load("csv", file), file.read_bytes().decode("utf-8-sig")
    for encoding in ("utf-16", "utf-8", "utf-8-sig"):
        file.write_bytes(plain.encode(encoding))
        assert load("csv", file) == expected
    for line, delimiter in (("sep=;", ";"), ('"sep=,"', ","), ("SEP=|", "|"), ("sep=\t", "\t")):
        file.write_text(f"{line}\n{plain.replace(',', delimiter)}")
        assert load("csv", file) == expected
    file.write_text("sep=,\n" + plain + "x.jpg,,1,train\n")
    assert f"line {2 + plain.count(chr(10))}: identity is empty" in said(load, "csv", file)


@pytest.mark.parametrize("more", [0, 10_000])
def test_own_csv_with_a_quote_that_does_not_close(tmp_path, more):
    rows = ["1.jpg,a,1,train", '2.jpg,"b,1,query', "3.jpg,b,2,gallery", *(f"{n}.jpg,b,2,gallery" for n in range(more))]
    (tmp_path / "list.csv").write_text("\n".join(["path,identity,camera,split", *rows]))
    words = said(load, "csv", tmp_path)
    assert words.startswith(f"{tmp_path / 'list.csv'} line 3: a quote opens that does not close where the value ends (")
    assert check("csv", tmp_path)["problems"] == [words]


def test_labels_of_training_identities_do_not_depend_on_the_test(tmp_path):
    rows = ["1.jpg,m,1,train", "2.jpg,z,1,train", "3.jpg,b,2,gallery", "4.jpg,b,1,query"]
    before = load("csv", csv_file(tmp_path, *rows)).train
    assert load("csv", csv_file(tmp_path, *rows, "5.jpg,a,2,gallery")).train == before
    assert tags(before) == [(1, 1), (2, 1)]


def test_leaks_and_duplicates_have_their_lines(tmp_path):
    file = csv_file(
        tmp_path, "1.jpg,anna,,train", "1.jpg,anna,,train", "2.jpg,b,,query", "2.jpg,b,,gallery", "3.jpg,b,,gallery",
        "4.jpg,anna,,gallery", "1.jpg,anna,,gallery", "5.jpg,c,,query",
    )  # fmt: skip
    splits = load("csv", file)
    assert splits.protocol == "plain" and splits.name_of(1) == "anna"
    lines = [
        "1 identity is in train and in the test, the first is anna: their scores would be too good; "
        "take them out of one of the two",
        f"2 files are in two parts, the first is {tmp_path / '1.jpg'} (train and gallery); list each in one part",
        f"1 file is listed twice in one part, the first is {tmp_path / '1.jpg'} (train); list each once",
    ]
    report = check("csv", file)
    assert report["leaking"] == ["anna"] and report["unmatched_queries"] == 1
    assert report["problems"] == [
        *lines,
        "query: 1 of 2 queries have no gallery image of their identity and will not be scored; "
        "add gallery images of them, or remove them",
    ]

    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    assert leaks(splits) == lines  # names are all it looks at
    assert leaks(load("csv", csv_file(tmp_path, "1.jpg,a,,train", "2.jpg,b,,query", "3.jpg,b,,gallery"))) == []


def test_a_query_may_lie_in_the_gallery_where_its_camera_leaves_it_out(tmp_path):
    rows = ["1.jpg,a,1,train", "2.jpg,b,1,query", "2.jpg,b,1,gallery", "3.jpg,b,2,gallery"]
    assert leaks(load("csv", csv_file(tmp_path, *rows))) == []
    miniature.mars(tmp_path)
    miniature.vehicleid(tmp_path)
    assert leaks(load("mars", tmp_path)) == leaks(load("vehicleid", tmp_path)) == []


def test_a_leak_is_named_as_the_list_names_it(tmp_path):
    """Lists that count from 0 are read as from 1; a person is found again only by the list's own number."""
    folder = miniature.vehicleid(tmp_path)
    text(folder / "train_test_split" / "test_list_800.txt", ["0000101 7", "0000102 7", "0000201 3"])
    folder = miniature.vric(tmp_path)
    text(folder / "vric_gallery.txt", ["00001.jpg 5 10"])
    folder = miniature.veri_wild(tmp_path)
    text(folder / "train_test_split" / "test_3000.txt", ["00003/000010"])
    miniature.msmt17(tmp_path)
    image(miniature.market(tmp_path) / "query" / "0007_c1s1_000001_01.jpg")
    people = {"vehicleid": "7", "vric": "5", "veri-wild": "00003", "market": "7"}
    for name, person in people.items():
        assert check(name, tmp_path)["leaking"] == [person], name
        assert f"the first is {person}: " in leaks(load(name, tmp_path))[0]
    assert load("msmt17", tmp_path).name_of(10_003) == "2"
    joined = load("market+vric", tmp_path)
    assert (joined.name_of(7), joined.name_of(1_000_006)) == ("7", "5")


def test_a_fingerprint_stands_for_the_lists_and_not_for_the_place(tmp_path, monkeypatch):
    for place in ("here", "there/under another name"):
        (tmp_path / place).mkdir(parents=True)
        miniature.own_folder(tmp_path / place)
        miniature.own_csv(tmp_path / place / "csv")
    csv = load("csv", tmp_path / "here" / "csv")
    here = load("folder", tmp_path / "here")
    honest = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: honest(path)[::-1])
    there = load("folder", tmp_path / "there/under another name")
    assert fingerprint(here) == fingerprint(there) != fingerprint(csv)
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(here))
    shuffled = dataclasses.replace(csv, train=csv.train[::-1], gallery=csv.gallery[::-1])
    assert fingerprint(shuffled) == fingerprint(csv)
    one = csv.train[0]
    for other in (one._replace(path="a/other.jpg"), one._replace(identity=2), one._replace(camera=9)):
        changed = dataclasses.replace(csv, train=(other, *csv.train[1:]))
        assert fingerprint(changed) != fingerprint(csv)
        assert fingerprint(changed, ("query", "gallery")) == fingerprint(csv, ("query", "gallery"))
    tested = load("csv", tmp_path / "here" / "csv", parts=("query", "gallery"))
    assert fingerprint(tested, ("query", "gallery")) == fingerprint(csv, ("query", "gallery")) != fingerprint(csv)


def test_a_query_that_lies_in_the_gallery_too_is_one_picture(tmp_path):
    folder = miniature.veri(tmp_path)
    other = miniature.jpeg((1, 2, 3))  # a name alone is not enough
    (folder / "image_test" / "0005_c011_00064720_0.jpg").write_bytes(other)
    splits = load("veri", tmp_path)
    query, gallery = picture_numbers(splits.query, splits.gallery)
    assert [gallery.index(number) if number in gallery else None for number in query] == [0, None]
    assert splits.gallery[0].path.endswith("image_test/0002_c002_00030600_0.jpg")
    assert len(set(gallery)) == len(gallery)
    Path(splits.gallery[0].path).unlink()
    query, gallery = picture_numbers(splits.query, splits.gallery)
    assert not set(query) & set(gallery)  # what is not there is no twin, and no error
    miniature.mars(tmp_path)
    mars = load("mars", tmp_path)
    query, gallery = picture_numbers(mars.query, mars.gallery)
    assert [mars.gallery[gallery.index(number)] for number in query] == list(mars.query)

# ------------------------------------------------------------------------------------------------- several at once
def test_joined_datasets_share_no_label_and_keep_the_first_ones_test(tmp_path):
    for write in (miniature.market_500k, miniature.msmt17, miniature.veri, miniature.vehicleid):
        write(tmp_path)
    market, msmt = load("market", tmp_path), load("msmt17", tmp_path)
    both = load("market+msmt17", tmp_path)
    assert both.name == "market+msmt17" and both.protocol == "market1501" and both.train_part == "train"
    assert (both.query, both.gallery, both.junk) == (market.query, market.gallery, market.junk)
    assert both.train[: len(market.train)] == market.train
    moved = both.train[len(market.train) :]
    assert [(s.path, s.identity - 1_000_000, s.camera - 1_000_000) for s in moved] == [s[:3] for s in msmt.train]
    other = load("msmt17/train+val+market+500k+veri+vehicleid/test-1600", tmp_path)
    assert other.name == "msmt17/train+val+market+500k+veri+vehicleid/test-1600"
    assert other.query == msmt.query and other.protocol == "msmt17"
    assert other.train_part == "msmt17/train+val: train+val, market+500k: train, veri: train, vehicleid/test-1600: train"
    identities = [{s.identity // 1_000_000 for s in part.train} for part in (both, other)]
    assert identities == [{0, 1}, {0, 1, 2, 3}]
    cameras = {(s.camera, os.path.dirname(os.path.dirname(s.path))) for s in other.train if "MSMT" not in s.path}
    assert len({camera for camera, _ in cameras}) == len(cameras)
    (tmp_path / "Market-1501-v15.09.15").rename(tmp_path / "gone")  # the others only train
    test = load("msmt17+market", tmp_path, parts=("query",))
    assert (test.name, test.train, test.query) == ("msmt17+market", (), msmt.query)
    assert said(load, "msmt17+market", tmp_path).startswith(f"dataset 'market' is not under {tmp_path}")


def test_a_joined_label_depends_on_the_names_alone(tmp_path):
    miniature.market(tmp_path)
    miniature.msmt17(tmp_path)
    before = {s.path: s.identity for s in load("market+msmt17", tmp_path).train}
    image(tmp_path / "Market-1501-v15.09.15" / "bounding_box_train" / "1400_c1s1_000001_01.jpg")
    after = {s.path: s.identity for s in load("market+msmt17", tmp_path).train}
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_names_that_cannot_be_joined(tmp_path):
    assert said(load, "market+market+500k+market", tmp_path) == (
        "dataset 'market+market+500k+market' names market twice; join different datasets"
    )
    assert said(load, "cuhk03/detected+cuhk03/labeled", tmp_path).endswith("names cuhk03 twice; join different datasets")
    assert said(load, "market+folder", tmp_path) == (
        "dataset 'market+folder': 'folder' is --root itself and cannot be joined to datasets inside it; list its images in "
        "a .csv file beside the others' folders and join 'csv'"
    )
    miniature.market(tmp_path)
    csv_file(tmp_path, "x/1.jpg,anna,20220711212617,train")
    assert said(load, "market+csv", tmp_path) == (
        f"dataset 'csv' numbers {tmp_path / 'x' / '1.jpg'} identity 1, camera 20220711212617; to be joined with others all "
        "numbers must be below 1,000,000: renumber them"
    )


def test_joined_datasets_are_checked_one_by_one(tmp_path):
    miniature.market(tmp_path)
    folder = miniature.msmt17(tmp_path)
    (folder / "test" / "0000" / "0000_000_01_0114morning_0301_0.jpg").write_bytes(b"")
    report = json.loads(json.dumps(check("market+msmt17", tmp_path)))
    parts = ("train", "query", "gallery")
    assert list(report["splits"]) == [f"{name} {part}" for name in ("market", "msmt17") for part in parts]
    assert report["dataset"] == "market+msmt17" and report["title"] == "Market-1501 + MSMT17 V1"
    assert len(report["problems"]) == 1 and report["problems"][0].startswith("msmt17 unreadable or truncated image ")
    assert "msmt17 gallery" in describe(report)


def test_the_package_says_what_it_offers():
    assert all(hasattr(data, name) for name in data.__all__)

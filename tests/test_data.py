"""Sets whose file names say everything: every folder name, only the parts asked for, words for each way a copy goes wrong.

The sets with lists, and the user's own, are in test_datasets.py.
"""

import os
import sys
import types

import pytest
from miniature import JPEG, MESS

from autoreid.data import DATASETS, Sample, check, describe, load, market, veri
from autoreid.errors import UserError

PEOPLE = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_01.jpg", "0007_c3s3_000001_01.jpg"],
    "query": ["0001_c1s1_000151_00.jpg", "0003_c6s1_000151_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg", "-1_c2s1_000401_03.jpg", "0000_c1s1_000151_01.jpg",
        "0001_c2s1_000151_01.jpg", "0003_c6s1_000176_01.jpg",
    ],
}  # fmt: skip
VEHICLES = {
    "image_train": ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg"],
    "image_query": ["0002_c002_00030600_0.jpg"],
    "image_test": ["0002_c002_00030605_1.jpg", "0002_c013_00030630_0.jpg"],
}


def make(folder, files=None, parts=None):
    """A dataset folder with its stray files; ``parts`` limits which of its folders are there."""
    for directory, names in (files or PEOPLE).items():
        if parts is None or directory in parts:
            (folder / directory / "__MACOSX").mkdir(parents=True)
            for name in [*names, *MESS]:
                (folder / directory / name).write_bytes(JPEG)
    return folder


def said(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("inside", [*market.FOLDERS, "."])
def test_market_under_every_folder_name(tmp_path, inside):
    folder = make(tmp_path / inside)
    splits = load("market", tmp_path)
    assert splits.train == (
        Sample(str(folder / "bounding_box_train" / "0002_c1s1_000451_03.jpg"), 2, 1),
        Sample(str(folder / "bounding_box_train" / "0002_c2s1_000451_01.jpg"), 2, 2),
        Sample(str(folder / "bounding_box_train" / "0007_c3s3_000001_01.jpg"), 7, 3),
    )
    assert [s[1:3] for s in splits.query] == [(1, 1), (3, 6)]
    assert [s[1:3] for s in splits.gallery] == [(0, 1), (1, 2), (3, 6)]  # distractor kept, junk left out
    assert (splits.name, splits.protocol, splits.junk) == ("market", "market1501", 2)
    assert load("market", folder) == splits  # the dataset's folder itself


@pytest.mark.parametrize("inside", [*veri.FOLDERS, "."])
def test_veri_has_three_digit_cameras(tmp_path, inside):
    make(tmp_path / inside, VEHICLES)
    splits = load("veri", tmp_path)
    assert [s[1:3] for s in splits.train] == [(1, 1), (1, 20)]
    assert [s[1:3] for s in splits.gallery] == [(2, 2), (2, 13)]
    assert (splits.protocol, splits.junk) == ("veri", 0)


def test_a_relative_root_gives_absolute_paths(tmp_path, monkeypatch):
    make(tmp_path / "Market-1501")
    monkeypatch.chdir(tmp_path)
    assert all(os.path.isabs(s.path) for s in load("market", ".").train)


def test_samples_are_sorted_whatever_the_listing_says(tmp_path, monkeypatch):
    make(tmp_path)
    expected = load("market", tmp_path)
    honest = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: honest(path)[::-1])
    assert load("market", tmp_path) == expected


def test_a_search_sees_train_alone(tmp_path, monkeypatch):
    make(tmp_path / "bare", parts=["bounding_box_train"])
    assert len(load("market", tmp_path / "bare", parts=("train",)).train) == 3  # query and gallery do not exist
    make(tmp_path / "whole")
    opened = []
    monkeypatch.setattr(os, "listdir", lambda path, honest=os.listdir: opened.append(str(path)) or honest(path))
    splits = load("market", tmp_path / "whole", parts=("train",))
    assert opened == [str(tmp_path / "whole" / "bounding_box_train")]
    assert splits.query == splits.gallery == ()


def test_nobody_is_trained_on(tmp_path):
    files = {**PEOPLE, "bounding_box_train": ["0000_c1s1_1_0.jpg", "-1_c1s1_1_0.jpg", "0005_c1s1_1_0.jpg"]}
    assert [s.identity for s in load("market", make(tmp_path, files)).train] == [5]


def test_drawn_sets_are_drawn_and_then_read_like_the_real_ones(tmp_path, monkeypatch):
    asked = []

    def ensure(kind, size, root=None):
        asked.append((kind, size, root))
        return tmp_path / kind

    make(tmp_path / "people")
    make(tmp_path / "vehicles", VEHICLES)
    stand_in = types.SimpleNamespace(ensure=ensure)
    monkeypatch.setitem(sys.modules, "autoreid.data.drawn", stand_in)
    monkeypatch.setattr("autoreid.data.drawn", stand_in, raising=False)
    names = [name for name in DATASETS if name.startswith("drawn-")]
    assert [load(name, root=tmp_path).protocol for name in names] == ["market1501"] * 3 + ["veri"] * 3
    sizes = ["small", "tiny", "market"]
    assert asked == [(kind, size, str(tmp_path)) for kind in ("people", "vehicles") for size in sizes]
    assert check("drawn-people-tiny")["differs"] == []  # no official counts to differ from


def test_mistakes_about_where_it_is(tmp_path):
    known = ", ".join(sorted(DATASETS))
    assert said(load, "markt") == f"unknown dataset 'markt'; did you mean 'market'? known: {known}"
    assert said(load, "market", tmp_path, parts=("test",)) == "unknown part 'test'; known: gallery, query, train"
    assert said(load, "market") == (
        "dataset 'market' needs --root DIR: the folder that holds Market-1501-v15.09.15, or that folder itself; "
        "to try without files use --dataset drawn-people"
    )
    assert said(load, "veri", tmp_path) == (
        f"dataset 'veri' is not under {tmp_path}: looked there and in its VeRi/VeRi, VeRi, VeRi-776, VeRi_776, "
        "VeRi776, VeRi_with_plate, veri, veri776, veri-776, veri_776 for the folders image_train, image_query, image_test; "
        "give --root the folder that holds VeRi, or that folder itself"
    )
    nowhere = tmp_path / "nowhere"
    assert f"dataset 'veri' is not under {nowhere} (no such folder): looked" in said(load, "veri", nowhere)


@pytest.mark.parametrize("part", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_half_copied_dataset_says_which_half(tmp_path, part):
    names = {directory: name for name, directory in market.PARTS.items()}
    make(tmp_path, parts=set(PEOPLE) - {part})
    start = f"dataset 'market' at {tmp_path} is incomplete: folder '{part}' ({names[part]})"
    end = "copy the whole dataset again (bounding_box_train, query, bounding_box_test)"
    assert said(load, "market", tmp_path) == f"{start} is missing; {end}"
    assert said(load, "market", tmp_path, parts=[names[part]]) == f"{start} is missing; {end}"
    (tmp_path / part).mkdir()
    (tmp_path / part / "Thumbs.db").touch()
    assert said(load, "market", tmp_path) == f"{start} holds no images; {end}"


def test_names_that_do_not_parse(tmp_path):
    make(tmp_path, {**PEOPLE, "query": ["b.jpg", "a.jpg", "0002_c002_00030600_0.jpg"]})  # the last is VeRi's
    assert said(load, "market", tmp_path) == (
        f"dataset 'market' at {tmp_path}: none of the 3 images in 'query' is named like 0002_c1s1_000451_03.jpg "
        "(identity, camera), the first is '0002_c002_00030600_0.jpg'; rename them or choose another --dataset"
    )


def test_check_counts_and_names_what_to_mend(tmp_path):
    make(tmp_path)
    train = tmp_path / "bounding_box_train"
    (train / "0002_c2s1_000451_01.jpg").write_bytes(JPEG[:-300])  # truncated: the header still opens
    (train / "0007_c3s3_000001_01.jpg").write_bytes(b"not an image")
    (train / "photo.jpg").write_bytes(JPEG)
    report = check("market", tmp_path)
    assert report["splits"] == {
        "train": {"images": 3, "identities": 2, "cameras": 3, "junk": 0, "distractors": 0, "unparsed": 1},
        "query": {"images": 2, "identities": 2, "cameras": 2, "junk": 0, "distractors": 0, "unparsed": 0},
        "gallery": {"images": 5, "identities": 2, "cameras": 3, "junk": 2, "distractors": 1, "unparsed": 0},
    }
    assert report["single_image_identities"] == 1 and report["unmatched_queries"] == 1
    broken = [str(train / "0002_c2s1_000451_01.jpg"), str(train / "0007_c3s3_000001_01.jpg")]
    assert report["unreadable"] == broken
    assert report["differs"] == [
        "train: 3 images, officially 12,936",
        "train: 2 identities, officially 751",
        "query: 2 images, officially 3,368",
        "query: 2 identities, officially 750",
        "gallery: 5 images, officially 19,732",
        "gallery: 2 identities, officially 750",
        "4 cameras, officially 6",
    ]
    assert report["problems"] == [
        "train: 1 images are not named like 0002_c1s1_000451_03.jpg and are ignored, the first is 'photo.jpg'; "
        "rename or remove them",
        "train: 1 identities have a single image, so a triplet has no positive for them; "
        "add images of them, or leave it: the sampler repeats the image",
        "query: 1 of 2 queries have no gallery image of their identity from another camera and will not be scored; "
        "check the camera numbers in the names, or use --protocol plain",
        *[f"unreadable or truncated image {path}: copy this file again or delete it" for path in broken],
    ]
    text = describe(report)
    assert text.count("unless this is a subset on purpose, unpack the archive again") == 1
    assert "\nprotocol market1501\n" in text
    assert all(f"problem: {problem}" in text for problem in report["problems"])
    assert check("market", tmp_path, read_images=False)["unreadable"] == []


def test_check_reports_a_missing_part_and_goes_on(tmp_path):
    make(tmp_path, parts=["query", "bounding_box_train"])
    report = check("market", tmp_path)
    assert report["splits"]["gallery"]["images"] == 0
    assert report["problems"][0].endswith(
        "is incomplete: folder 'bounding_box_test' (gallery) is missing; "
        "copy the whole dataset again (bounding_box_train, query, bounding_box_test)"
    )


@pytest.mark.slow
def test_the_drawn_vehicles_agree_with_their_own_oracle(tmp_path):
    assert check("drawn-vehicles-tiny", tmp_path)["problems"] == []


def test_a_list_of_samples_needs_no_torch_and_no_matlab():
    import subprocess

    code = "import sys, autoreid.data; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'scipy', 'h5py')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_picture_cache_without_fcntl(tmp_path):
    """Windows has none."""
    import subprocess

    image = make(tmp_path / "data") / "query" / "0001_c1s1_000151_00.jpg"
    code = f"""
import sys, types
import autoreid.runs, torch
sys.modules["fcntl"] = None
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, locking=lambda *arguments: locked.append(arguments[1:]))
from autoreid.pictures import Pictures
[picture] = Pictures([{str(image)!r}], (8, 4), {str(tmp_path / "cache")!r}).read([0])
assert picture.shape == (3, 8, 4) and locked == [(1, 1)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

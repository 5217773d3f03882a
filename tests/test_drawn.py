"""The embedded datasets: same seed same bytes, true layouts, look-alikes that can be told apart, masks, and no leak."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoreid.data import drawn, drawn_layout, drawn_people, drawn_scene, drawn_vehicles
from autoreid.errors import UserError

MODULES = {"people": drawn_people, "vehicles": drawn_vehicles}
COUNTS = drawn.Counts(train_identities=6, train_tracklets=14, train_images=31, test_identities=5, queries=13,
                      gallery=27, cameras=4, distractors=4, junk=3)


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> dict[str, Path]:
    """A very small dataset of each kind, drawn in this process."""
    patch = pytest.MonkeyPatch()
    patch.setitem(drawn.SIZES, "mini", drawn.DrawnSize(people=COUNTS, vehicles=replace(COUNTS, distractors=0, junk=0)))
    root = tmp_path_factory.mktemp("drawn")
    yield {kind: drawn.ensure(kind, "mini", root, workers=1, progress=False) for kind in drawn.KINDS}
    patch.undo()


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*.jpg")}


def truth(folder: Path) -> list[dict[str, str]]:
    with open(folder / "truth.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- determinism ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", drawn.KINDS)
def test_two_workers_draw_the_same_bytes_as_one(kind, mini, tmp_path):
    again = drawn.ensure(kind, "mini", tmp_path, workers=2, progress=False)
    assert hashes(again) == hashes(mini[kind])
    for name in ("truth.csv", "identities.json", "masks/gallery.npz"):
        assert (again / name).read_bytes() == (mini[kind] / name).read_bytes()


def test_another_seed_draws_other_pictures_into_another_folder(mini):
    other = drawn.ensure("people", "mini", mini["people"].parent, seed=8, workers=1, progress=False)
    assert other.name == "drawn-people-mini-seed8"
    assert not set(hashes(other).values()) & set(hashes(mini["people"]).values())


def test_workers_need_no_main_guard(tmp_path):
    """A script without `if __name__ == "__main__"` must be able to ask for a dataset."""
    script = tmp_path / "script.py"
    script.write_text("from autoreid.data import drawn\n"
                      f"drawn.SIZES['mini'] = drawn.DrawnSize(people=drawn.{COUNTS!r}, vehicles=drawn.{COUNTS!r})\n"
                      f"print(drawn.ensure('people', 'mini', {str(tmp_path)!r}, workers=2))\n")
    package = str(Path(drawn.__file__).parents[2])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": package}, check=True)
    assert done.stdout.strip() == str(tmp_path / "drawn-people-mini")
    assert re.search(r"drawn-people-mini: 78/78 images, \d+ a second, 0 s left", done.stderr)


# --- counts, names, layout --------------------------------------------------------------------------------------------

NAMES = {"people": r"(-1|\d{4})_c(\d)s\d_\d{6}_\d{2}\.jpg", "vehicles": r"(\d{4})_c(\d{3})_\d{8}_\d\.jpg"}


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_counts_names_and_pixels_are_those_of_the_layout(kind, mini):
    counts, _ = drawn.SIZES["mini"].of(kind)
    expected = {"train": 31, "query": 13, "gallery": 27 + counts.distractors + counts.junk}
    ids: dict[str, set[int]] = {}
    for split, folder in drawn_layout.FOLDERS[kind].items():
        files = sorted((mini[kind] / folder).iterdir())
        assert len(files) == expected[split]
        parsed = [re.fullmatch(NAMES[kind], file.name) for file in files]
        assert all(parsed)
        ids[split] = {int(match[1]) for match in parsed}
        assert {int(match[2]) for match in parsed} <= {1, 2, 3, 4}
        with Image.open(files[0]) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert image.size == (MODULES[kind].WIDTH, MODULES[kind].HEIGHT)
    assert ids["train"] == set(range(1, 7)) and ids["query"] == set(range(7, 12))
    assert ids["gallery"] == ids["query"] | ({-1, 0} if kind == "people" else set())
    assert not ids["train"] & ids["gallery"]


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_each_identity_and_camera_has_one_query_and_its_own_camera_junk(kind, mini):
    rows = [row for row in truth(mini[kind]) if row["role"] == "good"]
    queries = Counter((row["identity"], row["camera"]) for row in rows if row["split"] == "query")
    gallery = Counter((row["identity"], row["camera"]) for row in rows if row["split"] == "gallery")
    assert set(queries.values()) == {1} and set(queries) == set(gallery)


def test_the_market_sizes_have_the_counts_of_the_real_sets():
    people, vehicles = drawn.SIZES["market"].people, drawn.SIZES["market"].vehicles
    for kind, counts, expected in (("people", people, (12_936, 3_368, 19_732, 751, 750)),
                                   ("vehicles", vehicles, (37_778, 1_678, 11_579, 576, 200))):
        shots = [shot for job in drawn.plan(kind, counts, 7) for shot in job.shots]
        split = Counter(shot.split for shot in shots)
        ids = {s: {x.identity for x in shots if x.split == s and x.identity > 0} for s in split}
        assert (split["train"], split["query"], split["gallery"], len(ids["train"]), len(ids["query"])) == expected
        assert len({shot.number for shot in shots}) == len(shots)


@pytest.mark.parametrize("size", drawn.SIZES)
@pytest.mark.parametrize("kind", drawn.KINDS)
def test_every_size_has_three_cameras_per_identity_and_gallery_frames_by_each(kind, size):
    counts, _ = drawn.SIZES[size].of(kind)
    assert counts.train_tracklets >= 3 * counts.train_identities and counts.queries >= 3 * counts.test_identities
    assert counts.gallery >= counts.queries and counts.train_images >= counts.train_tracklets


def test_veri_index_files_agree_with_brute_force(mini):
    folder = mini["vehicles"]
    names = {name: (folder / f"name_{name}.txt").read_text().split() for name in ("train", "query", "test")}
    for name, part in (("train", "image_train"), ("query", "image_query"), ("test", "image_test")):
        assert names[name] == sorted(path.name for path in (folder / part).iterdir())
    good, junk = ([[int(n) for n in line.split()] for line in (folder / file).read_text().splitlines()]
                  for file in ("gt_index.txt", "jk_index.txt"))
    assert len(good) == len(junk) == len(names["query"])
    for query, good_rows, junk_rows in zip(names["query"], good, junk):
        same = [row for row, name in enumerate(names["test"], 1) if name[:4] == query[:4]]
        assert good_rows == [row for row in same if names["test"][row - 1][5:9] != query[5:9]]
        assert junk_rows == [row for row in same if names["test"][row - 1][5:9] == query[5:9]] and junk_rows
    tracks = [line.split() for line in (folder / "test_track.txt").read_text().splitlines()]
    assert sorted(name for track in tracks for name in track) == names["test"]


def test_veri_labels_name_every_image(mini):
    folder = mini["vehicles"]
    colours, types = ((folder / f).read_text().splitlines() for f in ("list_color.txt", "list_type.txt"))
    assert colours[0] == "1 white" and types[0] == "1 sedan"
    for file, part in (("train_label.xml", "image_train"), ("test_label.xml", "image_test")):
        # as for the real files: Python's parser has no gb2312, so the declaration is cut off
        items = xml.fromstring((folder / file).read_text().split("?>", 1)[1]).find("Items").findall("Item")
        assert sorted(item.get("imageName") for item in items) == sorted(p.name for p in (folder / part).iterdir())
        for item in items:
            assert item.get("imageName").startswith(f"{item.get('vehicleID')}_{item.get('cameraID')}_")
            assert 1 <= int(item.get("colorID")) <= len(colours) and 1 <= int(item.get("typeID")) <= len(types)


# --- identities -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,count,n_diff", [("people", 2, 4), ("people", 4, 2), ("vehicles", 2, 6)])
def test_look_alikes_share_the_base_and_differ_pairwise_in_visible_attributes(kind, count, n_diff):
    module = MODULES[kind]
    for seed in range(60):
        group = module.draw_group(np.random.default_rng(seed), count, n_diff)
        shared = set(module.attributes(group[0])) - set(module.LOCAL) - {"height", "build"}
        for k, member in enumerate(group):
            a, b = module.attributes(group[0]), module.attributes(member)
            assert {name: a[name] for name in shared} == {name: b[name] for name in shared}
            for other in group[:k]:
                assert module.told_apart(member, other)


def test_people_told_apart_on_paper_are_told_apart_on_two_of_four_yaws():
    """The table of what is seen from where, held against the renderer."""
    for seed in range(25):
        figures = [drawn_people.dress(p) for p in drawn_people.draw_group(np.random.default_rng(seed), 2, 2)]
        # height and build differ by a percent: equal ones make the comparison pixel by pixel fair
        figures[1] = drawn_people.dress(replace(figures[1].person, height=figures[0].person.height,
                                                build=figures[0].person.build))
        differing = 0
        for yaw in np.radians([20, 110, 200, 290]):
            pictures = []
            for figure in figures:
                canvas = drawn_people.Canvas(256, 128, 0.0, 0.6)
                drawn_people.paint(canvas, figure, yaw, 0.6, 0.6, (64, 244), 225, 0.1)
                pictures.append(canvas.rgb)
            differing += int((np.abs(pictures[0] - pictures[1]).max(2) > 0.1).sum() > 60)
        assert differing >= 2, (seed, drawn_people.differences(figures[0].person, figures[1].person))


def test_vehicles_told_apart_on_paper_are_told_apart_from_front_and_rear():
    scale, offset, light = np.array((80.0, 80.0)), np.array((48.0, 60.0)), np.array((0.3, 0.3, 0.83))
    for seed in range(25):
        pair = drawn_vehicles.draw_group(np.random.default_rng(seed), 2, 6)
        painted = [drawn_vehicles.dress(vehicle) for vehicle in pair]
        differing = []
        for yaw in np.radians([35, 145, 215, 325]):
            screen, to_camera = drawn_vehicles.project(yaw, 0.35)
            first, second = (drawn_vehicles.paint_faces(one.faces, screen, to_camera, scale, offset, light, 0.6, 96, 96)[0]
                             for one in painted)
            differing.append(int((np.abs(first - second).max(2) > 0.1).sum()) > 20)
        assert sum(differing) >= 2, (seed, drawn_vehicles.differences(*pair))


def test_mirror_images_and_hidden_things_do_not_count_as_differences():
    person = drawn_people.draw_person(np.random.default_rng(1))
    left = replace(person, bag=("hand", "red", "white", 1), armband=("red", 1), bottom_kind="trousers")
    right = replace(left, bag=("hand", "red", "white", -1), armband=("red", -1),
                    shoe=(left.shoe[0], left.shoe[1], "black" if left.shoe[2] != "black" else "white"))
    assert drawn_people.differences(left, right) == set()
    assert not drawn_people.told_apart(left, replace(left, back=("ring", "white", 3)))


def test_a_back_hides_the_logo():
    person = replace(drawn_people.draw_person(np.random.default_rng(3)), top="black", pattern="plain", inner=None,
                     logo=("disc", "yellow", 0, "middle"), back=None, bag=None, scarf=None, coat=False)
    figure = drawn_people.dress(person)
    yellow = []
    for yaw in (0.0, np.pi):
        canvas = drawn_people.Canvas(256, 128, 0.0, 0.6)
        drawn_people.paint(canvas, figure, yaw, 0.0, 0.0, (64, 244), 225, 0.1)
        torso = canvas.rgb[canvas.part == drawn_people.PARTS.index("torso")]
        yellow.append(int((torso[:, 0] - torso[:, 2] > 0.3).sum()))
    assert yellow[0] > 100 and yellow[1] == 0


# --- truth, masks, floors ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", drawn.KINDS)
def test_masks_cover_a_plausible_part_and_are_named_like_the_files(kind, mini):
    module = MODULES[kind]
    for split, part in drawn_layout.FOLDERS[kind].items():
        files, masks = drawn_layout.read_masks(mini[kind], split)
        assert files == sorted(path.name for path in (mini[kind] / part).iterdir())
        assert masks.shape == (len(files), module.HEIGHT, module.WIDTH)
        covered = masks.mean((1, 2))[[not name.startswith("-1") for name in files]]
        assert 0.10 < np.median(covered) < 0.75 and covered.max() < 0.9
        with np.load(mini[kind] / "masks" / f"{split}.npz") as stored:
            assert stored["parts"].max() < len(stored["part_names"])
            agree = (stored["parts"] > 0) == masks[:, ::2, ::2]
            assert agree.mean() > 0.95


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_the_truth_has_a_row_per_image_and_an_entry_per_identity(kind, mini):
    rows = truth(mini[kind])
    assert len(rows) == len(hashes(mini[kind]))
    known = json.loads((mini[kind] / "identities.json").read_text())
    assert {int(k) for k in known} == set(range(1, 12))
    groups = defaultdict(set)
    for row in rows:
        assert 0 <= float(row["yaw"]) < 360 and 0 <= float(row["occluded"]) <= 1
        assert set(filter(None, row["visible"].split("+"))) <= set(MODULES[kind].LOCAL)
        if row["person"] != "0":
            assert known[row["person"]]["group"] == int(row["group"])
            groups[row["group"]].add(row["person"])
    assert sorted(map(len, groups.values())) == [1, 2, 2, 2, 2, 2]


def test_colour_histograms_stay_near_chance_on_the_test_side_of_tiny(tmp_path, monkeypatch):
    size = drawn.SIZES["tiny"]
    few = replace(size.people, train_identities=2, train_tracklets=6, train_images=6)     # the train side plays no part
    monkeypatch.setitem(drawn.SIZES, "tiny", replace(size, people=few))
    tiny = drawn.ensure("people", "tiny", tmp_path, progress=False)
    descriptors, ids, cams = {}, {}, {}
    for split in ("query", "gallery"):
        files = sorted((tiny / drawn_layout.FOLDERS["people"][split]).iterdir())
        files = [file for file in files if not file.name.startswith("-1")]
        bins = np.stack([(np.asarray(Image.open(file)) // 32).astype(int) @ [64, 8, 1] for file in files])
        counts = np.stack([np.bincount(b.ravel(), minlength=512) for b in bins])
        descriptors[split] = np.sqrt(counts / counts.sum(1, keepdims=True))
        ids[split] = np.array([int(file.name[:4]) for file in files])
        cams[split] = np.array([int(file.name[6]) for file in files])
    precision = []
    for row, identity, camera in zip(descriptors["query"] @ descriptors["gallery"].T, ids["query"], cams["query"]):
        keep = ~((ids["gallery"] == identity) & (cams["gallery"] == camera))
        hits = (ids["gallery"][keep] == identity)[np.argsort(-row[keep])]
        places = np.flatnonzero(hits)
        precision.append(np.mean(np.arange(1, len(places) + 1) / (places + 1)))
    assert np.mean(precision) < 0.10


def test_every_camera_has_its_own_street_and_look():
    views = [drawn_scene.make_camera(7, "people", k, 0.3, 128, 64) for k in range(3)]
    assert len({view.panorama.tobytes() for view in views}) == 3
    assert len({view.gain.tobytes() for view in views}) == 3
    again = drawn_scene.make_camera(7, "people", 0, 0.3, 128, 64)
    assert again.panorama.tobytes() == views[0].panorama.tobytes()


# --- making it --------------------------------------------------------------------------------------------------------

def test_a_finished_dataset_is_not_drawn_again_and_its_own_folder_will_do_as_root(mini, monkeypatch):
    monkeypatch.setattr(drawn, "run_jobs", lambda *_: pytest.fail("drawn again"))
    folder = mini["people"]
    assert drawn.ensure("people", "mini", folder.parent) == folder
    assert drawn.ensure("people", "mini", folder) == folder


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(drawn.SIZES, "mini", drawn.DrawnSize(people=COUNTS, vehicles=COUNTS))

    def stop(*_):
        yield drawn.draw_job(order, drawn.cameras(order), drawn.plan("people", COUNTS, 7)[0])
        raise KeyboardInterrupt

    counts, nuisance = drawn.SIZES["mini"].of("people")
    (tmp_path / "bounding_box_train").mkdir()       # the one folder that the first job, a train group, writes to
    order = drawn.Order("people", counts, nuisance, 7, str(tmp_path))
    root = tmp_path / "root"
    monkeypatch.setattr(drawn, "run_jobs", stop)
    with pytest.raises(KeyboardInterrupt):
        drawn.ensure("people", "mini", root, workers=1, progress=False)
    assert list(root.iterdir()) == []


def test_of_two_processes_the_slower_takes_the_folder_of_the_faster(mini, tmp_path):
    folder = mini["people"]
    manifest = json.loads((folder / "manifest.json").read_text())
    made_of = {key: manifest[key] for key in ("format", "version", "kind", "size", "seed", "counts", "nuisance")}
    late = tmp_path / "late"
    late.mkdir()
    (late / "manifest.json").write_text("{}")
    before = hashes(folder)
    drawn._publish(late, folder, made_of)
    assert hashes(folder) == before


def test_a_folder_drawn_otherwise_is_refused_with_what_to_do(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "VERSION", 99)
    with pytest.raises(UserError) as caught:
        drawn.ensure("people", "mini", mini["people"].parent)
    assert str(caught.value) == (f"{mini['people']} was drawn otherwise (version 1 instead of 99); delete that folder "
                                 "to have it drawn anew, or give another root")
    half = tmp_path / "drawn-people-mini"
    half.mkdir()
    (half / "query").mkdir()
    with pytest.raises(UserError) as caught:
        drawn.ensure("people", "mini", tmp_path)
    assert str(caught.value) == (f"{half} is there but is no finished drawn dataset (no manifest.json); delete it and "
                                 "try again")


def test_unknown_kinds_and_sizes_name_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.delitem(drawn.SIZES, "mini", raising=False)
    with pytest.raises(UserError) as caught:
        drawn.ensure("peeple", "tiny", tmp_path)
    assert str(caught.value) == "unknown kind of drawn data 'peeple'; did you mean 'people'? known: people, vehicles"
    with pytest.raises(UserError) as caught:
        drawn.ensure("people", "tinny", tmp_path)
    assert str(caught.value) == "unknown size of drawn data 'tinny'; did you mean 'tiny'? known: market, small, tiny"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_or_forbidden_folder_is_told_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        drawn.ensure("people", "tiny", tmp_path / "file" / "below", progress=False)


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    counts, nuisance = drawn.SIZES["tiny"].of("people")
    order = drawn.Order("people", counts, nuisance, 7, str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        list(drawn.run_jobs(order, drawn.plan("people", counts, 7)[:4], workers=2))


def test_the_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOREID_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert drawn.default_root() == tmp_path / "a"
    monkeypatch.delenv("AUTOREID_CACHE")
    assert drawn.default_root() == tmp_path / "b" / "autoreid"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert drawn.default_root() == tmp_path / ".cache" / "autoreid"


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_examples_are_small(kind, tmp_path):
    assert drawn.main([kind, "--examples", str(tmp_path / "sheet.png")]) == 0
    assert 10_000 < (tmp_path / "sheet.png").stat().st_size < 250_000

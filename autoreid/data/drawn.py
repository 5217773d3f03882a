"""The embedded datasets: drawn people (layout of Market-1501) and drawn vehicles (layout of VeRi-776).

The real sets cannot be shipped. These are drawn instead, from a seed, and written exactly as the real ones lie on disk,
so that the code that reads them is the code that reads the real ones. They are hard in the right way: identities come
in look-alike groups that differ in local attributes only, every camera has its own colours and its own street, and
pictures of one identity by one camera are near duplicates.

The way: :func:`plan` deals images to identities, cameras and tracklets; each job of the plan (one look-alike group) is
drawn by :func:`draw_job`; :func:`ensure` runs the jobs in worker processes and publishes the finished folder with one
rename. Every identity, tracklet and frame has its own random stream, so the bytes depend on the seed (and on the
versions of numpy and Pillow), never on the number of workers.

    python -m autoreid.data.drawn people small          # make it and print where it lies
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from autoreid.data import drawn_layout, drawn_people, drawn_vehicles
from autoreid.data.drawn_scene import Camera, Nuisance, make_camera
from autoreid.data.drawn_workers import run_jobs
from autoreid.errors import UserError, unknown

VERSION = 1         # raise it whenever the pixels of any seed change
SEED = 7
KINDS: dict[str, ModuleType] = {"people": drawn_people, "vehicles": drawn_vehicles}
STREAMS = {"people": 1, "vehicles": 2}      # the first word after the seed of every random stream


@dataclass(frozen=True)
class Counts:
    """How many of what; a tracklet is one identity before one camera."""

    train_identities: int
    train_tracklets: int
    train_images: int
    test_identities: int
    queries: int            # = test tracklets: each gives one query image ...
    gallery: int            # ... and some of these gallery images
    cameras: int
    distractors: int = 0    # gallery images of identity 0000
    junk: int = 0           # gallery images of identity -1: badly cut boxes
    group: int = 2          # look-alikes that share all but local attributes
    n_diff: int = 4         # local attributes drawn anew for each of them


# measured by benchmarks/drawn_difficulty.py: stronger cameras hide the small cues from a small net
PEOPLE_NUISANCE = Nuisance(strength=0.30, occlusion=0.10, align=0.6, jitter=0.5)
VEHICLES_NUISANCE = Nuisance(strength=0.20, occlusion=0.08, align=0.4, jitter=0.5)


@dataclass(frozen=True)
class DrawnSize:
    """One size of both kinds, and how hard its pictures are."""

    people: Counts
    vehicles: Counts
    people_nuisance: Nuisance = PEOPLE_NUISANCE
    vehicles_nuisance: Nuisance = VEHICLES_NUISANCE

    def of(self, kind: str) -> tuple[Counts, Nuisance]:
        return getattr(self, kind), getattr(self, f"{kind}_nuisance")


SIZES: dict[str, DrawnSize] = {
    # for the demo and the tests: seconds to draw, minutes to learn something from
    "tiny": DrawnSize(people=Counts(80, 240, 720, 40, 120, 240, 4, distractors=30, junk=10),
                      vehicles=Counts(100, 300, 900, 40, 120, 240, 4, n_diff=6)),
    # for comparisons: a minute to draw
    "small": DrawnSize(people=Counts(300, 1200, 3600, 120, 480, 960, 6, distractors=200, junk=60),
                       vehicles=Counts(600, 2400, 7200, 120, 480, 960, 6, n_diff=6)),
    # the counts of Market-1501 and of VeRi-776: for speed at full size
    "market": DrawnSize(people=Counts(751, 3371, 12_936, 750, 3_368, 13_115, 6, distractors=2_798, junk=3_819),
                        vehicles=Counts(576, 5_146, 37_778, 200, 1_678, 11_579, 20, n_diff=6)),
}


@dataclass(frozen=True)
class Shot:
    """One image to draw."""

    number: int             # unique in the data set: names the random stream of the frame
    split: str              # train, query or gallery
    role: str               # good, distractor or junk
    member: int             # who of the group
    person: int             # the true identity; 0 for a distractor
    identity: int           # what the file name says: -1 for junk
    camera: int             # from 1
    tracklet: int


@dataclass(frozen=True)
class Job:
    """One look-alike group and all its images."""

    group: int
    members: int
    shots: tuple[Shot, ...]


def deal(total: int, hands: int, rng: np.random.Generator) -> np.ndarray:
    """Spread `total` over `hands` as evenly as integers allow, the larger shares in random places."""
    shares = np.full(hands, total // hands)
    shares[rng.permutation(hands)[:total % hands]] += 1
    return shares


def plan(kind: str, counts: Counts, seed: int) -> list[Job]:
    """Who is seen where and how often. Identities are numbered from 1, the train ones first."""
    rng = np.random.default_rng([seed, STREAMS[kind], 21])
    shots: dict[int, list[Shot]] = {}       # by identity
    tracklets = number = 0
    test_shots: list[Shot] = []
    for split, first, identities, total, images in (
            ("train", 1, counts.train_identities, counts.train_tracklets, counts.train_images),
            ("test", 1 + counts.train_identities, counts.test_identities, counts.queries, counts.gallery)):
        per_identity = deal(total, identities, rng)
        per_tracklet = iter(deal(images, total, rng))
        for identity, seen in zip(range(first, first + identities), per_identity):
            member = (identity - first) % counts.group
            for camera in sorted(rng.choice(counts.cameras, seen, replace=False)):
                frames = int(next(per_tracklet))
                splits = ["train"] * frames if split == "train" else ["query"] + ["gallery"] * frames
                for where in splits:
                    shots.setdefault(identity, []).append(
                        Shot(number, where, "good", member, identity, identity, int(camera) + 1, tracklets))
                    number += 1
                if split == "test":
                    test_shots.append(shots[identity][-1])
                tracklets += 1
    for k in rng.integers(len(test_shots), size=counts.junk):
        near = test_shots[k]
        shots[near.person].append(
            Shot(number, "gallery", "junk", near.member, near.person, -1, near.camera, near.tracklet))
        number += 1
    jobs: list[Job] = []
    for first, identities in ((1, counts.train_identities), (1 + counts.train_identities, counts.test_identities)):
        for start in range(first, first + identities, counts.group):
            members = range(start, min(start + counts.group, first + identities))
            jobs.append(Job(len(jobs), len(members), tuple(shot for m in members for shot in shots[m])))
    for camera in rng.integers(counts.cameras, size=counts.distractors):
        jobs.append(Job(len(jobs), 1, (Shot(number, "gallery", "distractor", 0, 0, 0, int(camera) + 1, tracklets),)))
        number, tracklets = number + 1, tracklets + 1
    return jobs


@dataclass(frozen=True)
class Order:
    """All that a worker process needs to draw its share of the jobs."""

    kind: str
    counts: Counts
    nuisance: Nuisance
    seed: int
    folder: str             # where the images go


def cameras(order: Order) -> list[Camera]:
    module = KINDS[order.kind]
    return [make_camera(order.seed, order.kind, index, order.nuisance.strength, module.HEIGHT, module.WIDTH)
            for index in range(order.counts.cameras)]


def draw_job(order: Order, views: list[Camera], job: Job) -> list[drawn_layout.Record]:
    """Draw the images of one job into the order's folder and return what is known about each."""
    module, stream = KINDS[order.kind], STREAMS[order.kind]
    specs = module.draw_group(np.random.default_rng([order.seed, stream, 31, job.group]), job.members,
                              order.counts.n_diff)
    subjects = [module.dress(spec) for spec in specs]
    walks, records = {}, []
    for shot in job.shots:
        view = views[shot.camera - 1]
        if shot.tracklet not in walks:
            rng = np.random.default_rng([order.seed, stream, 41, shot.tracklet])
            walks[shot.tracklet] = module.draw_walk(rng, view, order.nuisance)
        picture = module.shoot(subjects[shot.member], view, walks[shot.tracklet], order.nuisance,
                               np.random.default_rng([order.seed, stream, 51, shot.number]), shot.role == "junk")
        file = drawn_layout.file_name(order.kind, shot.identity, shot.camera, shot.tracklet, shot.number)
        path = os.path.join(order.folder, drawn_layout.FOLDERS[order.kind][shot.split], file)
        Image.fromarray(picture.image).save(path, "JPEG", quality=picture.quality)
        truth = {"split": shot.split, "file": file, "identity": shot.identity, "camera": shot.camera,
                 "tracklet": shot.tracklet, "group": job.group, "role": shot.role, "person": shot.person,
                 **picture.truth}
        with open(path, "rb") as stored:
            digest = hashlib.sha256(stored.read()).hexdigest()
        records.append(drawn_layout.Record(truth, np.packbits(picture.mask), picture.parts, digest,
                                           module.attributes(specs[shot.member])))
    return records


def ensure(kind: str, size: str = "small", root: str | os.PathLike[str] | None = None, seed: int = SEED,
           workers: int | None = None, progress: bool = True) -> Path:
    """The folder of a drawn dataset, drawn first if it is not there.

    `kind` is people or vehicles, `size` tiny, small or market. `root` is the folder that holds the dataset's folder, or
    that folder itself; by default $AUTOREID_CACHE, else the user's cache folder. `workers` is the number of processes
    (all the cores, 8 at most); it changes the time, never the bytes. Raises UserError for an unknown kind or size and
    where a folder of another version, seed or setting lies in the way; OSError where the disk refuses.
    """
    if kind not in KINDS:
        raise unknown("kind of drawn data", kind, KINDS)
    if size not in SIZES:
        raise unknown("size of drawn data", size, SIZES)
    counts, nuisance = SIZES[size].of(kind)
    name = f"drawn-{kind}-{size}" + ("" if seed == SEED else f"-seed{seed}")
    made_of = {"format": "autoreid-drawn", "version": VERSION, "kind": kind, "size": size, "seed": seed,
               "counts": asdict(counts), "nuisance": asdict(nuisance)}
    base = Path(root) if root is not None else default_root()
    for folder in (base / name, base):
        if (folder / "manifest.json").is_file() and (folder.name == name or folder == base / name):
            _check(folder, made_of)
            return folder
    folder = base / name
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there but is no finished drawn dataset (no manifest.json); delete it and try "
                        "again")
    base.mkdir(parents=True, exist_ok=True)
    _sweep(base, name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=base))
    try:
        temporary.chmod(0o755)      # mkdtemp's 0700 would hide a shared cache from everybody else
        order = Order(kind, counts, nuisance, seed, str(temporary))
        _fill(temporary, made_of, order, workers, name if progress else "")
        _publish(temporary, folder, made_of)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def default_root() -> Path:
    """$AUTOREID_CACHE, else $XDG_CACHE_HOME/autoreid, else ~/.cache/autoreid."""
    if os.environ.get("AUTOREID_CACHE"):
        return Path(os.environ["AUTOREID_CACHE"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "autoreid"


def _fill(folder: Path, made_of: dict, order: Order, workers: int | None, label: str) -> None:
    """Draw all images and write the files beside them; the manifest comes last."""
    for part in drawn_layout.FOLDERS[order.kind].values():
        (folder / part).mkdir()
    jobs = plan(order.kind, order.counts, order.seed)
    started = time.monotonic()
    records: list[drawn_layout.Record] = []
    for result in drawn_layout.follow(run_jobs(order, jobs, workers), sum(len(job.shots) for job in jobs), label):
        records += result
    module = KINDS[order.kind]
    records.sort(key=lambda record: (record.truth["split"], record.truth["file"]))
    drawn_layout.write_sidecars(folder, order.kind, records, (module.HEIGHT, module.WIDTH), module.PARTS)
    digest = hashlib.sha256("".join(record.digest for record in records).encode()).hexdigest()
    seconds = time.monotonic() - started
    manifest = {**made_of, "images": len(records), "sha256": digest, "seconds": round(seconds, 1),
                "images_per_second": round(len(records) / seconds, 1),
                "versions": {"numpy": np.__version__, "pillow": Image.__version__}}
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _check(folder: Path, made_of: dict) -> None:
    """Raise UserError unless the folder holds just what is asked for."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except ValueError:
        found = {}
    differing = [f"{key} {found.get(key)!r} instead of {value!r}" for key, value in made_of.items()
                 if found.get(key) != value]
    if differing:
        raise UserError(f"{folder} was drawn otherwise ({'; '.join(differing)}); delete that folder to have it drawn "
                        "anew, or give another root")


def _publish(temporary: Path, folder: Path, made_of: dict) -> None:
    """Rename the finished folder into place; where another process was faster, take its folder instead."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        _check(folder, made_of)


def _sweep(base: Path, name: str) -> None:
    """Remove what a killed process left behind, once it is a day old (a younger one may be at work)."""
    for left in base.glob(f".{name}.*.tmp"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def examples(kind: str, file: Path, identities: int = 6, seed: int = SEED) -> None:
    """Write a small contact sheet: one row per identity (neighbours are look-alikes), one column per camera."""
    module = KINDS[kind]
    counts, nuisance = SIZES["small"].of(kind)
    views = cameras(Order(kind, counts, nuisance, seed, ""))
    rows = []
    for group in range(identities // 2):
        for member, spec in enumerate(module.draw_group(
                np.random.default_rng([seed, STREAMS[kind], 31, group]), 2, counts.n_diff)):
            subject = module.dress(spec)
            rngs = [np.random.default_rng([seed, STREAMS[kind], 61, group, member, view.index]) for view in views]
            walks = [module.draw_walk(rng, view, nuisance) for view, rng in zip(views, rngs)]
            rows.append(np.hstack([module.shoot(subject, view, walk, nuisance, rng).image
                                   for view, walk, rng in zip(views, walks, rngs)]))
    sheet = Image.fromarray(np.vstack(rows)).quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autoreid.data.drawn", description="Make an embedded dataset.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("kind", help=" or ".join(KINDS))
    parser.add_argument("size", nargs="?", default="small", help=", ".join(SIZES))
    parser.add_argument("--root", help="the folder to put it in (default: the cache)")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed gives another world")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, 8 at most)")
    parser.add_argument("--examples", metavar="FILE.png", help="only write a small contact sheet")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.examples:
            if chosen.kind not in KINDS:
                raise unknown("kind of drawn data", chosen.kind, KINDS)
            examples(chosen.kind, Path(chosen.examples), seed=chosen.seed)
            print(chosen.examples)
        else:
            print(ensure(chosen.kind, chosen.size, chosen.root, chosen.seed, chosen.workers))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # under `-m` this file is __main__; the package's own module must do the work, or workers could not unpickle orders
    from autoreid.data.drawn import main as run_main

    sys.exit(run_main())

"""How a drawn dataset lies on disk: folders and names as in Market-1501 and VeRi-776, and the truth beside them.

Beside the images: `truth.csv` (one row per image), `identities.json` (one specification per identity) and
`masks/SPLIT.npz` with `files` (N names), `masks` (N x HW/8, bits), `parts` (N x H/2 x W/2, part numbers), `shape`
(H, W) and `part_names`. The vehicles also have VeRi's own lists; see :func:`_write_veri`.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDERS = {
    "people": {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"},
    "vehicles": {"train": "image_train", "query": "image_query", "gallery": "image_test"},
}


@dataclass(frozen=True)
class Record:
    """What is known about one image."""

    truth: dict[str, Any]
    mask: np.ndarray            # packed bits, HW/8 uint8
    parts: np.ndarray           # H/2 x W/2 uint8
    digest: str                 # sha256 of the file
    attributes: dict[str, Any]


def file_name(kind: str, identity: int, camera: int, tracklet: int, number: int) -> str:
    """A name as the real set has it; the frame number makes it unique."""
    if kind == "people":
        who = f"{identity:04d}" if identity >= 0 else "-1"
        return f"{who}_c{camera}s{tracklet % 6 + 1}_{25 * number + 1:06d}_00.jpg"
    return f"{identity:04d}_c{camera:03d}_{5 * number:08d}_0.jpg"


def read_masks(folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    """File names and foreground masks (N x H x W bool) of a split: train, query or gallery."""
    with np.load(Path(folder) / "masks" / f"{split}.npz") as stored:
        height, width = stored["shape"]
        bits = np.unpackbits(stored["masks"], axis=1, count=height * width)
        return stored["files"].tolist(), bits.reshape(-1, height, width).astype(bool)


def write_sidecars(folder: Path, kind: str, records: list[Record], shape: tuple[int, int],
                   parts: Iterable[str]) -> None:
    """Write all files that are not images; `records` are sorted by split and name."""
    (folder / "masks").mkdir()
    for split in FOLDERS[kind]:
        chosen = [record for record in records if record.truth["split"] == split]
        np.savez_compressed(
            folder / "masks" / f"{split}.npz", files=np.array([record.truth["file"] for record in chosen]),
            masks=np.stack([record.mask for record in chosen]), parts=np.stack([record.parts for record in chosen]),
            shape=np.array(shape), part_names=np.array(list(parts)))
    with open(folder / "truth.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0].truth))
        writer.writeheader()
        writer.writerows(record.truth for record in records)
    known = {str(record.truth["person"]): {"group": record.truth["group"], "attributes": record.attributes}
             for record in sorted(records, key=lambda record: record.truth["person"]) if record.truth["person"]}
    (folder / "identities.json").write_text(json.dumps(known, indent=1))
    if kind == "vehicles":
        _write_veri(folder, records)


def _write_veri(folder: Path, records: list[Record]) -> None:
    """VeRi's lists: names, good and junk rows per query (1-based rows of name_test.txt; good = same vehicle by another
    camera, junk = same vehicle by the same camera), labels, colours, types and tracks."""
    from autoreid.data.drawn_vehicles import COLOURS, TYPES

    splits: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        splits[record.truth["split"]].append(record)
    for split, name in (("train", "train"), ("query", "query"), ("gallery", "test")):
        (folder / f"name_{name}.txt").write_text("".join(f"{r.truth['file']}\n" for r in splits[split]))
    rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    tracks: dict[int, list[str]] = defaultdict(list)
    for row, record in enumerate(splits["gallery"], start=1):
        rows[record.truth["identity"]].append((row, record.truth["camera"]))
        tracks[record.truth["tracklet"]].append(record.truth["file"])
    for name, same in (("gt_index.txt", False), ("jk_index.txt", True)):
        with open(folder / name, "w") as file:
            for query in splits["query"]:
                chosen = [row for row, camera in rows[query.truth["identity"]]
                          if (camera == query.truth["camera"]) == same]
                file.write(" ".join(map(str, chosen)) + "\n")
    (folder / "test_track.txt").write_text("".join(" ".join(files) + "\n" for files in tracks.values()))
    for name, table in (("list_color.txt", COLOURS), ("list_type.txt", TYPES)):
        (folder / name).write_text("".join(f"{k} {value}\n" for k, value in enumerate(table, start=1)))
    for split, name, title in (("train", "train_label.xml", "TrainingImages"),
                               ("gallery", "test_label.xml", "TestImages")):
        with open(folder / name, "w", encoding="ascii") as file:
            file.write(f'<?xml version="1.0" encoding="gb2312"?>\n<{title} Version="1.0">\n'
                       f'<Items number="{len(splits[split])}">\n')
            for record in splits[split]:
                truth, known = record.truth, record.attributes
                file.write(f'<Item imageName="{truth["file"]}" vehicleID="{truth["identity"]:04d}" '
                           f'cameraID="c{truth["camera"]:03d}" colorID="{list(COLOURS).index(known["colour"]) + 1}" '
                           f'typeID="{list(TYPES).index(known["type"]) + 1}" />\n')
            file.write(f"</Items>\n</{title}>\n")


def follow(batches: Iterable[list[Record]], total: int, label: str) -> Iterator[list[Record]]:
    """Pass batches through and tell stderr the rate and the time left: a bar on a terminal, else a line every 5
    seconds. Without a label, silently."""
    if not label:
        yield from batches
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit="img", dynamic_ncols=True) as bar:
            for batch in batches:
                bar.update(len(batch))
                yield batch
        return
    started = told = time.monotonic()
    done = 0
    print(f"{label}: drawing {total} images", file=sys.stderr, flush=True)
    for batch in batches:
        done += len(batch)
        now = time.monotonic()
        if now - told > 5 or done == total:
            told, rate = now, done / (now - started + 1e-9)
            print(f"{label}: {done}/{total} images, {rate:.0f} a second, {(total - done) / rate:.0f} s left",
                  file=sys.stderr, flush=True)
        yield batch

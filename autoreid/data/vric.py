"""VRIC on disk (Kanaci, Zhu and Gong, "Vehicle Re-Identification in Context", GCPR 2018).

Three lists of lines ``image identity camera``; the file name says nothing. The archive has no folder of its own. A test
identity has one probe and one gallery image, by different cameras: mAP is the mean reciprocal rank.
"""

from __future__ import annotations

import os

from autoreid.data.layout import Layout, Reading, Sample
from autoreid.data.text import rows_of

PARTS = {
    "train": ("vric_train.txt", "train_images"),
    "query": ("vric_probe.txt", "probe_images"),
    "gallery": ("vric_gallery.txt", "gallery_images"),
}
EXAMPLE = "00001.jpg 12 7"


def _read(folder: str, part: str) -> Reading:
    listed, images = PARTS[part]
    rows = list(rows_of(os.path.join(folder, listed), 2, EXAMPLE))
    samples = [Sample(os.path.join(folder, images, name), who + 1, camera) for _, name, (who, camera) in rows]
    return Reading(samples, [], {who + 1: str(who) for _, _, (who, _) in rows})


LAYOUT = Layout(
    "VRIC",
    "vric",
    ("VRIC", "vric"),
    PARTS,
    _read,
    {"train": 54_808, "query": 2_811, "gallery": 2_811},
    {"train": 2_811, "query": 2_811, "gallery": 2_811},
    120,  # of the lists; the paper says 60
    EXAMPLE,
    "vehicles",
)

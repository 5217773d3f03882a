"""VehicleID on disk (Liu et al., "Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles",
CVPR 2016).

``train_test_split/train_list.txt`` and six ``test_list_N.txt`` of lines ``imageid vehicleid``; the image is
``image/<imageid>.jpg``. There are no cameras and no fixed gallery: the protocol draws one image of each identity into
the gallery, ten times over, and the rest ask. So query and gallery are both the whole test list here.

No image counts are stated: the paper's and those that toolkits print from the lists differ. The identities agree.
"""

from __future__ import annotations

import os
from functools import partial

from autoreid.data.layout import Layout, Reading, Sample
from autoreid.data.text import rows_of

FOLDERS = (
    "vehicleid/VehicleID_V1.0", "VehicleID/VehicleID_V1.0", "VehicleID_V1.0", "PKU-VehicleID",
    "VehicleID", "vehicleid",
)  # fmt: skip
SIZES = (800, 1_600, 2_400, 3_200, 6_000, 13_164)  # identities; the paper's three, and the archive's three larger ones
EXAMPLE = "0000001 12"


def _read(size: int, folder: str, part: str) -> Reading:
    path = os.path.join(folder, _list(size, part))
    samples, names = [], {}
    for _, name, (identity,) in rows_of(path, 1, EXAMPLE):
        file = f"{name.removesuffix('.jpg')}.jpg"
        samples.append(Sample(os.path.join(folder, "image", file), identity + 1, 0))
        names[identity + 1] = str(identity)
    return Reading(samples, [], names)


def _list(size: int, part: str) -> str:
    return f"train_test_split/{'train_list' if part == 'train' else f'test_list_{size}'}.txt"


VARIANTS = {
    f"test-{size}": (
        Layout(
            f"VehicleID, test list of {size:,}",
            f"vehicleid/test-{size}",
            FOLDERS,
            {part: (_list(size, part), "image") for part in ("train", "query", "gallery")},
            partial(_read, size),
            identities={"train": 13_164, "query": size, "gallery": size},
            cameras=0,
            example=EXAMPLE,
            kind="vehicles",
            one_test_list=True,
        ),
    )
    for size in SIZES
}

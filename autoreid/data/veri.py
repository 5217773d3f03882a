"""VeRi-776 on disk (Liu et al., "A Deep Learning-Based Approach to Progressive Vehicle Re-identification", ECCV 2016).

A file name is ``0002_c002_00030600_0.jpg``: identity (4 digits), camera (THREE digits: Market's one-digit pattern would
read camera 0 everywhere), frame, index. The set has no junk files; the names are those of ``autoreid.data.market``.
"""

import re

TITLE = "VeRi-776"
PROTOCOL = "veri"
FOLDERS: tuple[str, ...] = (
    "VeRi/VeRi", "VeRi", "VeRi-776", "VeRi_776", "VeRi776", "VeRi_with_plate",
    "veri", "veri776", "veri-776",
)
PARTS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
PATTERN = re.compile(r"(-?\d+)_c(\d{3})(?!\d)")
EXAMPLE = "0002_c002_00030600_0.jpg"
IMAGES = {"train": 37_778, "query": 1_678, "gallery": 11_579}
IDENTITIES = {"train": 576, "query": 200, "gallery": 200}

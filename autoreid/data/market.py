"""Market-1501 on disk (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015): facts, no code.

A file name is ``0002_c1s1_000451_03.jpg``: identity (4 digits, or ``-1``), camera (one digit), sequence, frame, box.
Identity ``-1`` is junk (a bad detection: it never takes part in a ranking); ``0000`` is a distractor (it is ranked and
matches nothing). A module with these names is a layout; ``autoreid.data.layout`` reads every such set from one.
"""

import re

TITLE = "Market-1501"
PROTOCOL = "market1501"
# Each toolkit wants another name; all are accepted, the longest way down first.
FOLDERS: tuple[str, ...] = (
    "market1501/Market-1501-v15.09.15",
    "Market-1501-v15.09.15",
    "market1501",
    "Market-1501",
    "Market1501",
    "market-1501",
    "market",
)
PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
PATTERN = re.compile(r"(-?\d+)_c(\d)(?!\d)")
EXAMPLE = "0002_c1s1_000451_03.jpg"
# Official counts: every file of the folder (junk and distractors too); identities without junk and distractors.
IMAGES = {"train": 12_936, "query": 3_368, "gallery": 19_732}
IDENTITIES = {"train": 751, "query": 750, "gallery": 750}
CAMERAS = 6

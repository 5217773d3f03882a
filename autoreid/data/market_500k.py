"""Market-1501 with the 500,000 distractors of the same authors (Zheng et al., ICCV 2015, section 3.3).

The archive ``distractors_500k.zip`` unpacks to a folder ``images/``, which toolkits want inside the Market folder.
Whatever its files are called, they are distractors: ranked in the gallery, a match for nobody.
"""

import os
from functools import partial

from autoreid.data import market
from autoreid.data.layout import DISTRACTOR, JUNK, Layout, Reading, Sample, image_names, read_named
from autoreid.errors import UserError

IMAGES = ("images", "../images", "distractors_500k/images", "../distractors_500k/images")


def _read(images: str, folder: str, part: str) -> Reading:
    known = read_named(os.path.join(folder, market.PARTS[part]), market.PATTERN)
    if part != "gallery":
        return known
    directory = os.path.normpath(os.path.join(folder, images))
    more, files = [], image_names(directory)
    if not files:  # else plain Market would be scored under this name
        raise UserError(f"{directory} holds no images; move the distractors' images into it, not one folder down")
    for file in files:
        match = market.PATTERN.match(file)
        identity = JUNK if match and int(match[1]) == JUNK else DISTRACTOR
        more.append(Sample(os.path.join(directory, file), identity, int(match[2]) if match else 0))
    return Reading(known.samples + more, known.strange)


VARIANTS = {
    "": tuple(
        Layout(
            "Market-1501 + 500k distractors",
            market.PROTOCOL,
            market.FOLDERS,
            {**{part: (folder,) for part, folder in market.PARTS.items()}, "gallery": (market.PARTS["gallery"], images)},
            partial(_read, images),
            {**market.IMAGES, "gallery": market.IMAGES["gallery"] + 500_000},
            market.IDENTITIES,
            example=market.EXAMPLE,
        )
        for images in IMAGES
    )
}

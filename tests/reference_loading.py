"""Slow, obvious twins of the augmentation: one picture, one pixel, one number at a time, over nested lists."""

import math

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def crop(picture, flip, top, left, height, width):
    """The window's pixels by asking the picture for each: black outside it; then every row backwards."""
    window = []
    for channel in picture:
        rows = []
        for y in range(top, top + height):
            row = []
            for x in range(left, left + width):
                inside = 0 <= y < len(channel) and 0 <= x < len(channel[0])
                row.append(channel[y][x] if inside else 0)
            rows.append(row[::-1] if flip else row)
        window.append(rows)
    return window


def finish(image, box):
    """(x / 255 - mean) / std, and 0 in the box."""
    top, left, height, width = box
    return [
        [
            [
                0.0 if top <= y < top + height and left <= x < left + width else (value / 255 - mean) / std
                for x, value in enumerate(row)
            ]
            for y, row in enumerate(channel)
        ]
        for channel, mean, std in zip(image, MEAN, STD, strict=True)
    ]


def place(u, pad, picture, size):
    """First row (or column) of the crop in the picture: one of all the places in the padded picture."""
    places = [start - pad for start in range(picture + 2 * pad - size + 1)]
    return places[math.floor(u * len(places))]


def box(u_erase, u_top, u_left, attempts, chance, height, width):
    """Random erasing as torchvision describes it; ``attempts`` are pairs (area, ratio) of numbers in [0, 1)."""
    if not u_erase < chance:
        return (0, 0, 0, 0)
    for u_area, u_ratio in attempts:
        area = height * width * (0.02 + (0.4 - 0.02) * u_area)
        ratio = math.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * u_ratio)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return (math.floor(u_top * (height - h + 1)), math.floor(u_left * (width - w + 1)), h, w)
    return (0, 0, 0, 0)


def patch(row, position, count, chance, picture, size):
    """OSNet's random patch, one attempt after another: None, or donor, corner, (height, width), place, mirror, turn.

    ``row`` is whether, donor, corner (2), place (2), mirror, turn, ten areas, ten ratios.
    """
    if not row[0] < chance or count == 1:
        return None
    for u_area, u_ratio in zip(row[8:18], row[18:28], strict=True):
        area = size[0] * size[1] * (0.01 + 0.49 * u_area)
        ratio = 0.1 + 9.9 * u_ratio
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < size[0] and w < size[1]:
            h, w = max(h, 1), max(w, 1)
            others = [i % count for i in range(position + 1, position + count)]
            turns = [0] * 21 + list(range(-10, 11))
            return (
                others[math.floor(row[1] * len(others))],
                (math.floor(row[2] * (picture[0] - h + 1)), math.floor(row[3] * (picture[1] - w + 1))),
                (h, w),
                (math.floor(row[4] * (size[0] - h + 1)), math.floor(row[5] * (size[1] - w + 1))),
                row[6] < 0.5,
                turns[math.floor(row[7] * 42)],
            )
    return None


def paste(image, donor, corner, size, place, mirror):
    """The image (nested lists) with a box of the donor in it, one pixel at a time."""
    pasted = [[list(row) for row in channel] for channel in image]
    for channel, given in zip(pasted, donor, strict=True):
        for y in range(size[0]):
            for x in range(size[1]):
                from_x = size[1] - 1 - x if mirror else x
                channel[place[0] + y][place[1] + x] = given[corner[0] + y][corner[1] + from_x]
    return pasted

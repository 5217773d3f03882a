"""What a gallery answers, for people to look at: one picture, or one page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from autoreid.pictures import UNREADABLE
from autoreid.plots import FRAMES, GREY, INK, new_figure

HEIGHT = 192  # pixels of a thumbnail
ANSWERS, QUERIES = 20, 10  # drawn in one picture; the page has all
COLOURS = {True: FRAMES["match"], False: GREY, None: INK}
READING = {True: "green: within the threshold, a match; grey: beyond it", False: "the index has no threshold"}

Answers = Sequence[Mapping[str, Any]]  # of each query: image, matches (rank, identity, path, distance, cosine, match)


def thumbnail(path: str) -> Image.Image | None:
    """The picture, at most 192 pixels high; None where it is gone or cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except UNREADABLE:
        return None
    small.thumbnail((4 * HEIGHT, HEIGHT))
    return small


def answers(found: Answers, title: str, has_threshold: bool) -> Figure:
    """A row per query: its picture, then what the gallery answers first, with identity, distance and cosine."""
    queries, deepest = len(found), max(len(query["matches"]) for query in found)
    found, depth = found[:QUERIES], min(deepest, ANSWERS)
    left = [f"the first {shown} of {count} {noun}" for shown, count, noun in
            ((len(found), queries, "queries"), (depth, deepest, "answers")) if shown < count]
    figure = new_figure(1.15 * (depth + 1) + 0.6, 2.5 * len(found) + 0.6, layout="constrained")
    figure.suptitle(_legible(title), x=0.01, ha="left", fontsize=12, parse_math=False)
    for row, query in zip(figure.subplots(len(found), depth + 1, squeeze=False), found, strict=True):
        for axes in row:
            axes.axis("off")
        _draw(row[0], query["image"], INK, "query")
        for axes, match in zip(row[1:], query["matches"], strict=False):
            _draw(axes, match["path"], COLOURS[match["match"]], f"{match['rank']}  {_short(match['identity'])}\n"
                  f"{match['distance']:.3f}  cos {match['cosine']:.2f}")
    notes = ["above each picture: rank, identity, distance, cosine", READING[has_threshold], *left]
    figure.supxlabel("; ".join(notes), fontsize=9, color="#555555")
    return figure


def _legible(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."


def _draw(axes: Axes, path: str, colour: str, text: str) -> None:
    image = thumbnail(path)
    if image is None:
        axes.text(0.5, 0.5, "picture\ngone", ha="center", va="center", fontsize=8, color=GREY, transform=axes.transAxes)
    else:
        axes.imshow(image, aspect="equal")
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour, linewidth=3)
    axes.set_title(_legible(text), fontsize=7.5, pad=3, parse_math=False)  # a $ in a name is no formula


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.row { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; max-width: 14rem; } img { height: ${height}px; border: 4px solid; }
.gone { height: ${height}px; width: 5rem; border: 4px solid; display: flex; align-items: center; justify-content: center; }
figcaption { font-size: 0.85rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$notes</p>
$rows
</body>
</html>
""")


def page(found: Answers, title: str, notes: Sequence[str]) -> str:
    """The same as a page; pictures are inside it, so that it can be mailed or archived as it is. All text is escaped."""
    rows = []
    for query in found:
        cells = [_cell(query["image"], INK, "query")]
        for match in query["matches"]:
            said = {True: "match", False: "no match", None: ""}[match["match"]]
            cells.append(_cell(match["path"], COLOURS[match["match"]], f"{match['rank']}. {match['identity']}",
                               f"distance {match['distance']:.4f}, cosine {match['cosine']:.4f}", said))
        rows.append(f"<h2>{escape(query['image'])}</h2>\n<div class=\"row\">\n" + "\n".join(cells) + "\n</div>")
    text = PAGE.substitute(title=escape(title), notes="<br>".join(map(escape, notes)), rows="\n".join(rows), height=HEIGHT)
    return _legible(text)


def _cell(path: str, colour: str, *lines: str) -> str:
    said = "<br>".join(escape(line) for line in lines if line)
    image = thumbnail(path)
    if image is None:
        shown = f'<div class="gone" style="border-color: {colour}">picture gone</div>'
    else:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=88)
        code = base64.b64encode(file.getvalue()).decode("ascii")
        name = escape(Path(path).name)
        shown = f'<img alt="{name}" title="{name}" style="border-color: {colour}" src="data:image/jpeg;base64,{code}">'
    return f"<figure>{shown}<figcaption>{said}</figcaption></figure>"

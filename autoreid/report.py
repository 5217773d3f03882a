"""One static page of a comparison: the table, the pictures inside it, the notes, and how to read them.

The page is made by the standard library only; pictures are data URIs and nothing is fetched, so the file can be
mailed or archived as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from autoreid import compare, plots
from autoreid.runs import write_bytes, write_text

READING = (
    "Each row of the table is one model; scores are means over its seeds, with the sample standard deviation.",
    "mAP is the mean over queries of average precision, mINP says how early the hardest right answer comes, rank-k is "
    + "the share of queries with a right answer among the first k. More is better.",
    "Parameters, MACs (multiply-accumulates of one image) and milliseconds are costs. Less is better.",
    "A Pareto front holds the models that no other model beats: none is as cheap and as good, and better in one.",
    "Differences smaller than the standard deviations are not evidence; train more seeds before believing them.",
)

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } tbody tr:hover { background: #f3f6fa; }
th.text, td.text { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; margin-bottom: 0.4rem; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>$title</h1>
<div class="wide">
$table
</div>
$notes
$pictures
<h2>How to read this</h2>
$reading
</body>
</html>
""")


def html(table_frame: pd.DataFrame, title: str, pictures: Mapping[str, bytes], notes: Sequence[str]) -> str:
    """The page as text.

    ``table_frame`` is shown as it is, so give it ``compare.readable(table)``; ``pictures`` are PNG bytes by caption,
    ``notes`` sentences such as ``compare.notes(table)``. All text is escaped.
    """
    return PAGE.substitute(
        title=escape(title),
        table=_table(table_frame),
        notes="<h2>Notes</h2>\n" + _listed(notes) if notes else "",
        pictures="\n".join(_picture(caption, png) for caption, png in pictures.items()),
        reading=_listed(READING),
    )


def write_comparison(folder: str | Path, table: pd.DataFrame) -> list[Path]:
    """Write comparison.csv, pareto.png and report.html of a ``compare.table`` into ``folder``; the paths written."""
    folder = Path(folder)
    fronts = compare.pareto_fronts(table)
    if table["latency_ms"].isna().all():
        del fronts["latency_ms"]
    picture = plots.png(plots.pareto_all(table, fronts))
    title = "Comparison on " + " and ".join(dict.fromkeys(table["dataset"]))
    page = html(compare.readable(table), title, {"Quality against cost": picture}, compare.notes(table))
    compare.to_csv(table, folder / "comparison.csv")
    write_bytes(folder / "pareto.png", picture)
    write_text(folder / "report.html", page)
    return [folder / name for name in ("comparison.csv", "pareto.png", "report.html")]


def _table(frame: pd.DataFrame) -> str:
    """An HTML table; columns of words to the left, of figures to the right."""
    is_text = [not any(_shown(cell)[:1].isdigit() for cell in frame[name]) for name in frame]
    lines = ["<table>", "<thead>", _row("th", frame.columns, is_text), "</thead>", "<tbody>"]
    lines += [_row("td", cells, is_text) for cells in frame.itertuples(index=False, name=None)]
    return "\n".join([*lines, "</tbody>", "</table>"])


def _row(tag: str, cells: Sequence[object], is_text: Sequence[bool]) -> str:
    starts = [f'<{tag} class="text">' if text else f"<{tag}>" for text in is_text]
    pairs = zip(starts, cells, strict=True)
    return "<tr>" + "".join(f"{start}{escape(_shown(cell))}</{tag}>" for start, cell in pairs) + "</tr>"


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _picture(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    said = escape(caption)
    return (
        f'<figure><figcaption>{said}</figcaption>\n<img alt="{said}" src="data:image/png;base64,{data}"></figure>'
    )


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in sentences), "</ul>"])

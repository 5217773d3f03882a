"""Pictures that can be read without help: Pareto fronts, cells, alphas and curves.

Everything here draws and computes nothing: what is on a front comes as a mask from ``compare.py``. Each function
returns a matplotlib ``Figure`` made without pyplot, so nothing is shared between calls and no display is needed.
Cells are drawn by hand, not by graphviz, whose Python package fails where its program is not installed.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from autoreid.data import Sample
from autoreid.genotype import Genotype, Node
from autoreid.options import read_json
from autoreid.ranked import RankedList
from autoreid.runs import write_bytes

INK, GREY, FRONT, PALE = "#222222", "#8a8a8a", "#c2410c", "#e8eef5"
# Okabe and Ito's colours: told apart by the colour blind too. The yellow is darkened for white paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8a000", "#56b4e9", "#5b2a86", "#000000", "#7f7f7f")
Mask = Sequence[bool] | np.ndarray
Label = tuple[float, float, float, str, bool]  # x, y, deviation, name, on the front?
LOG_FROM = 8  # a log axis where the dearest costs more than this times the cheapest
SCALES = {"params": 1e6, "macs": 1e9, "latency_ms": 1.0}


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG to ``path``, whole or not at all."""
    write_bytes(path, png(figure))


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty figure, inches, on the canvas that can measure its text."""
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


# ---------------------------------------------------------------------------------------- Pareto fronts
def pareto(
    table: pd.DataFrame,
    front: Mask,
    cost: str = "macs",
    quality: str = "mAP_mean",
    title: str | None = None,
) -> Figure:
    """Cost against quality of the rows of ``compare.table``, the rows where ``front`` is true joined by a step line.

    Shows names, standard deviations over seeds and units; rows marked as mixed are hollow. The cost axis is
    logarithmic where its span is above eightfold. Rows without the cost are left out.
    """
    figure = new_figure(8, 5.6, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title or _title(table), loc="left", fontsize=12)
    labels = _draw_front(axes, table, front, cost, quality)
    figure.supxlabel(_caption(table, "\n"), fontsize=9.5, color="#555555")
    _place(figure, axes, labels)
    return figure


def pareto_all(
    table: pd.DataFrame, fronts: Mapping[str, Mask], quality: str = "mAP_mean"
) -> Figure:
    """One panel per cost in ``fronts`` (parameters, MACs, latency), quality shared."""
    figure = new_figure(5.6 * len(fronts), 5.4, layout="constrained")
    panels = figure.subplots(1, len(fronts), sharey=True, squeeze=False)[0]
    figure.suptitle(_title(table), fontsize=13)
    drawn = [_draw_front(axes, table, front, cost, quality)
             for axes, (cost, front) in zip(panels, fronts.items(), strict=True)]  # fmt: skip
    for axes in panels[1:]:
        axes.set_ylabel("")
    figure.supxlabel(_caption(table, " "), fontsize=10.5, color="#555555")
    for axes, labels in zip(panels, drawn, strict=True):
        _place(figure, axes, labels)
    return figure


def costs(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Parameters against MACs of the rows of ``autoreid cost``, both axes logarithmic, every model named."""
    figure = new_figure(14, 9.5, layout="constrained")
    axes = figure.add_subplot()
    sizes = {"x".join(map(str, row["input"])) for row in rows}
    axes.set_title("What the models cost", loc="left", fontsize=12)
    axes.set_xlabel("Parameters (millions), without a classifier", fontsize=10.5)
    axes.set_ylabel(f"MACs (billions) of one {' or '.join(sorted(sizes)).replace('x', ' x ')} image", fontsize=10.5)
    x, y = (np.array([row[name] for row in rows]) / scale for name, scale in (("params", 1e6), ("macs", 1e9)))
    axes.scatter(x, y, color="#33658a", s=36, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, values, limit in ((axes.xaxis, x, axes.set_xlim), (axes.yaxis, y, axes.set_ylim)):
        _log_axis(axis, values, limit, 1.8)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    names: dict[tuple[float, float], list[str]] = {}
    for i, row in enumerate(rows):  # models of the very same cost share a label
        names.setdefault((x[i], y[i]), []).append(row["model"])
    _place(figure, axes, [(*point, 0.0, ", ".join(alike), False) for point, alike in names.items()])
    return figure


def _log_axis(axis: Axis, values: np.ndarray, limit: Callable[[float, float], object], margin: float) -> None:
    """A log axis with plain numbers at 1, 2 and 5."""
    low, high = values.min() / margin, values.max() * margin
    limit(low, high)
    axis.set_ticks([t for power in range(-6, 7) for step in (1, 2, 5) if low <= (t := step * 10.0**power) <= high])
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _title(table: pd.DataFrame) -> str:
    """Dataset(s) and number of seeds."""
    datasets = " and ".join(dict.fromkeys(map(str, table["dataset"])))
    low, high = table["seeds"].min(), table["seeds"].max()
    seeds = f"{low} seed{'s' if low != 1 else ''}" if low == high else f"{low} to {high} seeds"
    return f"{datasets}: quality against cost, {seeds} per model"


def _caption(table: pd.DataFrame, gap: str) -> str:
    """How to read the picture."""
    said = ["Better is up and to the left. Orange: the Pareto front, the models that no other model beats."]
    if (table["mixed"] != "").any():
        said.append("Hollow: not comparable with the others.")
    return gap.join(said)


def _cost_label(table: pd.DataFrame, cost: str) -> str:
    """The title of the cost axis, with units and the picture size where it is one."""
    sizes = set(table["input"])
    size = f"one {sizes.pop().replace('x', ' x ')} image" if len(sizes) == 1 else "one image"
    if cost == "params":
        return "Parameters (millions)"
    if cost == "macs":
        return f"MACs (billion multiply-accumulates) of {size}"
    places = [place for place in dict.fromkeys(table["latency_on"]) if place]
    if len(places) != 1:
        return "Latency (ms per batch), measured in several places" if places else "Latency (ms): not measured"
    device, batch, *processor = places[0].split(", ")
    return f"Latency (ms) on {device}, {batch} of {size}" + "".join(f"\n{name}" for name in processor)


def _draw_front(
    axes: Axes, table: pd.DataFrame, front: Mask, cost: str, quality: str
) -> list[Label]:
    """Points, error bars, step line and axes; gives back the names to place."""
    on_front = np.asarray(front, dtype=bool)
    x = table[cost].to_numpy(float) / SCALES[cost]
    y = 100 * table[quality].to_numpy(float)
    spread = np.nan_to_num(100 * table[quality.replace("_mean", "_std")].to_numpy(float))
    shown = np.isfinite(x) & np.isfinite(y)
    axes.set_xlabel(_cost_label(table, cost), fontsize=10.5)
    spread_label = "mean ± standard deviation over seeds" if table["seeds"].max() > 1 else "one seed"
    axes.set_ylabel(f"{quality.removesuffix('_mean').replace('rank', 'rank-')} (%), {spread_label}", fontsize=10.5)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if not shown.any():
        axes.text(0.5, 0.5, "no model has this cost", transform=axes.transAxes, ha="center", color=GREY)
        return []
    _limits(axes, x[shown], y[shown], spread[shown])
    members = np.flatnonzero(on_front & shown)
    members = members[np.lexsort((-y[members], x[members]))]
    if len(members):  # the front goes on to the right: a dearer model must beat the last one
        edge = axes.get_xlim()[1]
        across, up = np.repeat([*x[members], edge], 2)[1:-1], np.repeat(y[members], 2)
        axes.plot(across, up, color=FRONT, linewidth=1.6, alpha=0.5, zorder=2, gid="front")
    for i in np.flatnonzero(shown):
        colour = FRONT if on_front[i] else "#33658a"
        axes.errorbar(
            x[i], y[i], yerr=spread[i] or None, fmt="o", markersize=8 if on_front[i] else 6.5, color=colour,
            markerfacecolor="white" if table["mixed"].iloc[i] else colour, elinewidth=1.1, capsize=3, zorder=3,
        )  # fmt: skip
    names = _names(table)
    return [(x[i], y[i], spread[i], names[i], bool(on_front[i])) for i in np.flatnonzero(shown)]


def _names(table: pd.DataFrame) -> list[str]:
    """Model names; the genotype's key behind those that occur twice."""
    twice = table["model"].duplicated(keep=False)
    return [
        f"{row.model} ({row.genotype})" if again and isinstance(row.genotype, str) else row.model
        for row, again in zip(table.itertuples(), twice, strict=True)
    ]


def _limits(axes: Axes, x: np.ndarray, y: np.ndarray, spread: np.ndarray) -> None:
    """Axes with room for names around the outermost points; plain numbers on a log axis."""
    if x.min() > 0 and x.max() / x.min() > LOG_FROM:
        axes.set_xscale("log")
        _log_axis(axes.xaxis, x, axes.set_xlim, (x.max() / x.min()) ** 0.16)
    else:
        margin = 0.16 * (x.max() - x.min()) or 0.2 * abs(x.max()) or 1.0
        axes.set_xlim(x.min() - margin, x.max() + margin)
    low, high = (y - spread).min(), (y + spread).max()
    margin = 0.12 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


# Where a name may stand, as (dx, dy) in points from its point: beside and above first, farther off after.
OFFSETS = [
    (distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle)))
    for distance in (11, 20, 32, 46, 62, 80)
    for angle in (25, -25, 155, -155, 60, -60, 120, -120, 0, 180, 90, -90)
]


def _place(figure: Figure, axes: Axes, labels: Iterable[Label]) -> None:
    """Write the names so that none covers another, a point, an error bar or the edge of the axes.

    Greedy, members of the front first: each name takes the nearest of ``OFFSETS`` that is free, or the one that covers
    least; a name that had to go far is tied to its point by a thin line. The front's own line counts as taken too.
    """
    labels = sorted(labels, key=lambda label: (not label[4], -label[1]))
    if not labels:
        return
    figure.draw_without_rendering()  # the constrained layout moves the axes: settle it, then measure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dots = figure.dpi / 72
    x, y, spread = np.array([label[:3] for label in labels]).T
    points, lows, highs = (axes.transData.transform(np.stack([x, y + k * spread], axis=1)) for k in (0, -1, 1))
    taken = [*_boxes(points, points, 5 * dots), *_boxes(lows, highs, 3 * dots)]
    for line in axes.lines:
        if line.get_gid() == "front":
            corners = axes.transData.transform(line.get_xydata())
            taken += [*_boxes(corners[:-1], corners[1:], 2 * dots)]
    frame = np.array(axes.get_window_extent(renderer).extents)
    offsets = np.array(OFFSETS)
    for own, (at_x, at_y, _, name, on_front) in zip(points, labels, strict=True):
        note = axes.annotate(
            name, (at_x, at_y), xytext=(0, 0), textcoords="offset points", fontsize=9.5, zorder=4,
            color=INK if on_front else "#444444", fontweight="bold" if on_front else "normal", annotation_clip=False,
        )  # fmt: skip
        note.set_in_layout(False)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = note.get_window_extent(renderer)
        size = np.array([extent.width, extent.height])
        lower_left = own + offsets * dots - size * (1 - _side(offsets)) / 2
        boxes = np.concatenate([lower_left, lower_left + size], axis=1)
        # Outside the axes is ten times worse than on something. A name nearer to another's point misleads: as bad as
        # covering 15 x 15 points.
        cost = _shared(boxes, np.array(taken)).sum(axis=1) + 10 * (size.prod() - _shared(boxes, frame[None])[:, 0])
        nearer = _distances(boxes, points) < _distances(boxes, own[None]) + 3 * dots
        cost += (nearer & (points != own).any(axis=1)).sum(axis=1) * (15 * dots) ** 2
        chosen = int(np.lexsort((np.hypot(*offsets.T), cost.round()))[0])
        best, box = offsets[chosen], boxes[chosen]
        note.set_position(tuple(best))
        across, up = _side(best).astype(int)
        note.set_horizontalalignment(("center", "left", "right")[across])
        note.set_verticalalignment(("center", "bottom", "top")[up])
        taken.append(box)
        if np.hypot(*best) > 15:
            ends = np.stack([own, np.clip(own, box[:2], box[2:])])  # to the box's nearest place
            ends = axes.transData.inverted().transform(ends)
            axes.plot(*ends.T, color=GREY, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def _side(offsets: np.ndarray) -> np.ndarray:
    """Names grow away from their points: 1 to the positive side, -1 to the negative, 0 where they are centred."""
    return np.where(np.abs(offsets) < 3, 0, np.sign(offsets))


def _boxes(one: np.ndarray, other: np.ndarray, margin: float) -> np.ndarray:
    """N x 4 boxes (left, bottom, right, top) around the lines from N x 2 points to N x 2 others, pixels."""
    return np.concatenate([np.minimum(one, other) - margin, np.maximum(one, other) + margin], axis=1)


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """N x M areas that N x 4 boxes share with M x 4 boxes, square pixels."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return sides.clip(min=0).prod(axis=2)


def _distances(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """N x M distances from N x 4 boxes to M x 2 points, pixels."""
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    return np.linalg.norm(nearest - points[None], axis=2)


# ---------------------------------------------------------------------------------------- cells
ROW, COLUMN, PILL = 1.0, 2.2, 1.3  # inches between nodes down and across; width of an operation's box


def genotype(genotype: Genotype, title: str | None = None) -> Figure:
    """Both cells of a genotype, the normal above the reduction one."""
    width, height = _cell_size(len(genotype.normal))
    figure = new_figure(width, 2 * height + 0.5)
    figure.suptitle(title or f"Genotype of the space {genotype.space}", fontsize=13, y=1 - 0.12 / (2 * height + 0.5))
    top = 2 * height / (2 * height + 0.5)
    cells = (("Normal cell", genotype.normal), ("Reduction cell (halves the map)", genotype.reduction))
    for i, (name, nodes) in enumerate(cells):
        axes = figure.add_axes((0, top * (1 - i) / 2, 1, top / 2))
        _draw_cell(axes, nodes, name, genotype.concat)
    return figure


def cell(nodes: Sequence[Node], title: str, concat: Sequence[int] | None = None) -> Figure:
    """One cell, ``genotype.normal`` or ``genotype.reduction``; ``concat`` is every node unless told.

    Nodes are numbered as in genotype.json: 0 and 1 are the outputs of the two previous cells.
    """
    figure = new_figure(*_cell_size(len(nodes)))
    _draw_cell(figure.add_axes((0, 0, 1, 1)), nodes, title, concat)
    return figure


def _cell_size(nodes: int) -> tuple[float, float]:
    """Width and height in inches."""
    return COLUMN * nodes + 3.7, ROW * (nodes + 1) + 0.75


def _draw_cell(axes: Axes, nodes: Sequence[Node], title: str, concat: Sequence[int] | None = None) -> None:
    """The cell as a staircase, where nothing can overlap whatever the genotype.

    Node i stands one step right of and below node i - 1, its two operations as boxes at its left. A state's line
    leaves downwards and turns right at the row of the operation it feeds; so lines cross only at right angles, and
    never a box. Each state has its own colour.
    """
    concat = range(2, 2 + len(nodes)) if concat is None else concat
    width, height = _cell_size(len(nodes))
    axes.set(xlim=(0, width), ylim=(-height + 0.8, 0.8))
    axes.axis("off")
    axes.text(0.25, 0.5, title, fontsize=12, fontweight="bold", color=INK, va="center")

    def place(state: int) -> tuple[float, float]:
        return (0.75 + 1.25 * state, -0.05) if state < 2 else (COLUMN * (state - 1) + 2.0, -ROW * (state - 1))

    down: dict[int, list[float]] = {state: [] for state in range(len(nodes) + 2)}
    for i, pairs in enumerate(nodes, start=2):
        x, y = place(i)
        for (operation, state), lift in zip(pairs, (0.21, -0.21), strict=True):
            colour, row = COLOURS[state], y + lift
            start = place(state)[0]
            down[state].append(row)
            left = x - 0.52 - PILL
            _arrow(axes, (start, row), (left, row), colour)
            axes.plot(start, row, "o", markersize=4.5, color=colour, zorder=3)
            _box(axes, (left + PILL / 2, row), PILL, 0.34, operation, colour, "white", 9.5)
            _arrow(axes, (left + PILL, row), (x - 0.27, y + lift * 0.5), INK)
    bar = place(len(nodes) + 1)[0] + 1.15
    for state, rows in down.items():
        x, y = place(state)
        if rows:
            axes.plot([x, x], [y, min(rows)], color=COLOURS[state], linewidth=1.7, zorder=1)
        if state in concat:
            _arrow(axes, (x, y), (bar - 0.3, y), COLOURS[state])
        name = ("0: $c_{k-2}$", "1: $c_{k-1}$")[state] if state < 2 else str(state)
        _box(axes, (x, y), 1.05 if state < 2 else 0.54, 0.46, name, COLOURS[state], PALE, 11)
    top, bottom = place(2)[1] + 0.3, place(len(nodes) + 1)[1] - 0.3
    _box(axes, (bar, (top + bottom) / 2), 0.6, top - bottom, "concat  $c_k$", INK, PALE, 11, rotation=90)


def _box(
    axes: Axes, centre: tuple[float, float], width: float, height: float, text: str, edge: str, face: str, size: float,
    rotation: float = 0,
) -> None:  # fmt: skip
    """A rounded box with a text in it."""
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    style = "round,pad=0,rounding_size=0.09"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, style, facecolor=face, edgecolor=edge, linewidth=1.5, zorder=4)
    )
    axes.text(*centre, text, ha="center", va="center", fontsize=size, color=INK, rotation=rotation, zorder=5)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style, zorder=2)


# ---------------------------------------------------------------------------------------- alphas and curves
def alphas(frame: pd.DataFrame, title: str = "Architecture weights over the search") -> Figure:
    """The softmax weight of each operation on each edge over the epochs, a panel per edge.

    ``frame`` is long: columns epoch, cell ("normal" or "reduction"), edge ("0->2" or "2<-0": from state 0 into node
    2), operation, weight. Rows of panels are nodes, columns the states they read; the free corner holds the legend.
    """
    cells = [cell for cell in ("normal", "reduction") if cell in set(frame["cell"])]
    frame = frame.assign(edge=frame["edge"].map(_edge))
    edges = set(frame["edge"])
    targets, sources = sorted({target for target, _ in edges}), sorted({source for _, source in edges})
    operations = list(dict.fromkeys(frame["operation"]))
    colours = dict(zip(operations, itertools.cycle(COLOURS), strict=False))
    figure = new_figure(2.5 * len(sources) + 0.6, (1.75 * len(targets) + 0.75) * len(cells) + 0.5, layout="constrained")
    figure.suptitle(title, fontsize=14)
    top = frame["weight"].max() * 1.05
    blocks = figure.subfigures(len(cells), 1, squeeze=False)[:, 0]
    for block, cell in zip(blocks, cells, strict=True):
        block.suptitle(f"{cell.capitalize()} cell", fontsize=12, fontweight="bold", x=0.01, ha="left")
        panels = block.subplots(len(targets), len(sources), sharex=True, sharey=True, squeeze=False)
        ours = frame[frame["cell"] == cell]
        for i, target in enumerate(targets):
            for j, source in enumerate(sources):
                axes = panels[i, j]
                if (target, source) not in edges:
                    axes.set_visible(False)
                    continue
                _draw_edge(axes, ours[ours["edge"] == (target, source)], colours, f"{source} → {target}", top)
                if i == len(targets) - 1:
                    axes.set_xlabel("epoch", fontsize=9)
                if j == 0:
                    axes.set_ylabel("weight", fontsize=9)
    handles = [Line2D([], [], color=colour, linewidth=2.4, label=name) for name, colour in colours.items()]
    blocks[0].legend(handles=handles, loc="upper right", fontsize=10, frameon=False, title="operation")
    return figure


def _edge(written: str) -> tuple[int, int]:
    """(node, state it reads) of an edge written "0->2" or "2<-0"."""
    source, node = written.split("->") if "->" in written else reversed(written.split("<-"))
    return int(node), int(source)


def _draw_edge(axes: Axes, frame: pd.DataFrame, colours: Mapping[str, str], title: str, top: float) -> None:
    """The trajectories of one edge."""
    for operation, rows in frame.groupby("operation", sort=False):
        rows = rows.sort_values("epoch")
        axes.plot(rows["epoch"], rows["weight"], color=colours[operation], linewidth=1.5)
    axes.set_title(title, fontsize=9.5, pad=3)
    axes.set_ylim(0, top)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


METRICS = ("mAP", "mINP", "rank")


def curves(frame: pd.DataFrame, title: str = "Training curves") -> Figure:
    """Every numeric column over the column ``epoch``, a panel each; metrics (mAP, mINP, rank...) in percent.

    Rows without a value are passed over, so a column may be filled every tenth epoch only.
    """
    numeric = frame.select_dtypes("number").columns
    names = [name for name in numeric if name != "epoch" and frame[name].notna().any()]
    across = min(3, max(1, len(names)))
    down = max(1, math.ceil(len(names) / across))
    figure = new_figure(4.2 * across + 0.3, 2.9 * down + 0.6, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        is_metric = any(part in name for part in METRICS)
        rows = frame[["epoch", name]].dropna().sort_values("epoch")
        marker = "o" if len(rows) <= 25 else None
        values = rows[name] * (100 if is_metric else 1)
        axes.plot(rows["epoch"], values, color=COLOURS[0], marker=marker, markersize=3.5)
        axes.set_title(f"{name} (%)" if is_metric else str(name), fontsize=11, loc="left")
        axes.set_xlabel("epoch", fontsize=9.5)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.tick_params(labelsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def draw_search(folder: str | Path) -> list[Path]:
    """Draw what a search recorded in ``folder``: genotype.png, alphas.png and curves.png; the paths written.

    Reads genotype.json, alphas.csv and curves.csv there.
    """
    folder = Path(folder)
    pictures = {
        "genotype.png": genotype(Genotype.load(folder / "genotype.json")),
        "alphas.png": alphas(pd.read_csv(folder / "alphas.csv")),
        "curves.png": curves(pd.read_csv(folder / "curves.csv"), "Search curves"),
    }
    for name, figure in pictures.items():
        save(figure, folder / name)
    return [folder / name for name in pictures]


def draw_density(rows_by_model: Mapping[str, Mapping[str, float]], path: str | Path) -> Figure:
    """Draw the activation density of each model over its depth to ``path``; the figure, too.

    ``rows_by_model`` says for each model its groups' densities (0 to 1), from the input on:
    ``{row.group: row.density for row in density.activation_density(net, batches)}``. Models of the same groups share
    their names on the axis and the borders of their stages; others only have their place, L1, L2, ... in common.
    """
    longest = max((list(rows) for rows in rows_by_model.values()), key=len)
    shared = all(list(rows) == longest for rows in rows_by_model.values())
    figure = new_figure(max(6.4, 0.42 * len(longest) + 1.6), 4.4, layout="constrained")
    axes = figure.add_subplot()
    for (model, rows), colour in zip(rows_by_model.items(), itertools.cycle(COLOURS), strict=False):
        percent = [100 * density for density in rows.values()]
        axes.plot(range(1, len(rows) + 1), percent, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=model)
    stages = [group.split(".")[0] for group in longest]
    for i in range(1, len(longest)):
        if shared and stages[i] != stages[i - 1]:
            axes.axvline(i + 0.5, color=GREY, linewidth=0.7, linestyle=":", zorder=1)
    places = range(1, len(longest) + 1)
    axes.set_xticks(places, [group.removeprefix("stage") for group in longest] if shared else [f"L{i}" for i in places])
    axes.set_xlim(0.5, len(longest) + 0.5)
    axes.set_ylim(0, 102)  # a share of all: the whole of it is shown, so that no difference looks larger than it is
    axes.set_title("Activation density over the depth", loc="left", fontsize=12)
    axes.set_xlabel(f"{'stage.group' if shared and '.' in longest[-1] else 'groups'}, from the input on", fontsize=10.5)
    axes.set_ylabel("activations that are not zero (%)", fontsize=10.5)
    axes.grid(alpha=0.25, linewidth=0.7, axis="y")
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(rows_by_model)), fontsize=9.5, frameon=False)
    save(figure, path)
    return figure


# ---------------------------------------------------------------------------------------- studies
def tune_history(trials: Sequence[Mapping[str, Any]], title: str = "Trials of the study") -> Figure:
    """The value of each trial over its number, and the best so far as a step line. ``trials``: the rows of study.json.

    References carry their names; a pruned trial stands at its last report, one that failed at the foot.
    """
    figure = new_figure(9, 5, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("trial", fontsize=10.5)
    axes.set_ylabel("value: mean rank-normalised mAP of the panel, 0 to 1", fontsize=10.5)
    best = [(row["number"], row["best_value"]) for row in trials if row["best_value"] is not None]
    if best:
        x, y = zip(*best, strict=True)
        axes.step(x, y, where="post", color=FRONT, linewidth=1.6, alpha=0.5, gid="front", label="best so far")
    kinds: dict[str, tuple[str, dict[str, Any], list[tuple[int, float]]]] = {
        "reference": ("D", {"color": FRONT}, [(row["number"], row["value"]) for row in trials
                                              if row["reference"] and row["value"] is not None]),
        "finished": ("o", {"color": COLOURS[0]}, [(row["number"], row["value"]) for row in trials
                                                  if not row["reference"] and row["value"] is not None]),
        "pruned, at its last report": ("o", {"facecolors": "none", "edgecolors": GREY}, [
            (row["number"], row["steps"][-1]) for row in trials if row["state"] == "pruned" and row["steps"]]),
        "failed": ("x", {"color": GREY}, [(row["number"], 0.0) for row in trials if row["state"] == "failed"]),
    }
    for name, (marker, colours, points) in kinds.items():
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, marker=marker, s=36, zorder=3, label=name, **colours)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlim(-1, max((row["number"] for row in trials), default=0) + 1)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9.5, frameon=False)
    _place(figure, axes, [(row["number"], row["value"], 0.0, row["reference"], True) for row in trials
                          if row["reference"] and row["value"] is not None])
    return figure


def tune_importance(shares: Mapping[str, float], title: str = "What sets the best quarter of the trials apart") -> Figure:
    """A bar for each parameter, the most important one on top; shares of 1 together."""
    figure = new_figure(7, max(2.2, 0.3 * len(shares) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    if not shares:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "too few finished trials to tell", transform=axes.transAxes, ha="center", color=GREY)
        return figure
    bars = axes.barh(list(shares), [100 * share for share in shares.values()], color=COLOURS[0], height=0.7)
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=9, color="#444444")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("importance (%), PED-ANOVA", fontsize=10.5)
    axes.grid(alpha=0.25, linewidth=0.7, axis="x")
    axes.set_axisbelow(True)
    return figure


def draw_study(folder: str | Path) -> list[Path]:
    """Draw what study.json in ``folder`` tells: tune-history.png and tune-importance.png; the paths written."""
    folder = Path(folder)
    found = read_json(folder / "study.json", "study")
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items() if number)
    pictures = {
        "tune-history.png": tune_history(found["trials"], f"Study {found['study']}: {counts}"),
        "tune-importance.png": tune_importance(found["importance"]),
    }
    for name, figure in pictures.items():
        save(figure, folder / name)
    return [folder / name for name in pictures]


FRAMES = {"match": "#15803d", "wrong": "#b91c1c", "junk": "#a3a3a3"}


def ranked_lists(
    lists: Sequence[RankedList],
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    title: str,
    name_of: Callable[[int], str] = str,
) -> Figure:
    """A row per query: its picture, the end of its path and its identity as ``name_of`` has it, then what the gallery
    answers first. Green frame: a match; red: another identity; grey and pale: junk, which has no rank (the query's own
    camera or picture, or nobody)."""
    depth = max(len(ranked.gallery) for ranked in lists)
    figure = new_figure(1.05 * (depth + 1) + 0.6, 2.3 * len(lists) + 0.6, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    grid = figure.subplots(len(lists), depth + 1, squeeze=False)
    for row, ranked in zip(grid, lists, strict=True):
        for axes in row:
            axes.axis("off")
        asked = query[ranked.query]
        said = "not scored" if ranked.average_precision is None else f"AP {100 * ranked.average_precision:.0f} %"
        framed_picture(row[0], asked.path, INK, 1.0, f"{name_of(asked.identity)}\n{said}")
        row[0].set_ylabel("/".join(Path(asked.path).parts[-2:]), fontsize=7)
        rank = 0
        for axes, i, kind, distance in zip(row[1:], ranked.gallery, ranked.kinds, ranked.distances, strict=False):
            rank += kind != "junk"
            framed_picture(axes, gallery[i].path, FRAMES[kind], 0.35 if kind == "junk" else 1.0,
                           f"{'junk' if kind == 'junk' else rank}\n{distance:.2f}")
    figure.supxlabel("green: the same identity; red: another; grey: junk, which has no rank. Below a rank, the distance.",
                     fontsize=9, color="#555555")
    return figure


def framed_picture(axes: Axes, path: str, colour: str, strength: float, text: str) -> None:
    """The image at ``path`` in a frame of this colour, the text above it; ``strength`` 0 to 1 is how pale it is not."""
    with Image.open(path) as image:
        axes.imshow(image.convert("RGB"), alpha=strength, aspect="equal")
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour, linewidth=3)
    axes.set_title(text, fontsize=8, pad=3)

"""The picture of compressed embeddings: retrieval against the bytes that one image's embedding takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from autoreid.plots import COLOURS, INK, new_figure

NAMES = {"full": "full", "slice": "slicing", "low-rank": "low rank", "prune": "pruning", "pca": "PCA, not trained",
         "pq": "product quantisation, not trained", "int8": "int8, not trained", "cut": "cut after training"}
COLOUR_OF = {"full": INK, **dict(zip([name for name in NAMES if name != "full"], COLOURS, strict=False))}
# What is stored: line and marker.
STYLES = {"float32": ("-", "o"), "int8": ("--", "s"), "pq": (":", "^")}


def curve(found: Mapping[str, Any]) -> Figure:
    """mAP and rank-1 over the bytes (logarithmic) of the rows of ``compress.summary``, a line for each method and type,
    with the standard deviation over seeds; the grey line is the full float32 embedding. Points of equal bytes stand side
    by side."""
    figure = new_figure(12, 5.6, layout="constrained")
    seeds = sorted({seed for row in found["rows"] for seed in row["seeds"]})
    over = f"mean and standard deviation of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    figure.suptitle(f"{found['model']} on {found['dataset']}: retrieval against bytes per image ({over})", x=0.01,
                    ha="left", fontsize=12)
    panels = figure.subplots(1, 2)
    for axes, key, name in zip(panels, ("mAP", "rank1"), ("mAP (%)", "rank-1 (%)"), strict=True):
        _draw(axes, found["rows"], key)
        axes.set_ylabel(name, fontsize=10.5)
        axes.set_xlabel("bytes of one image's embedding", fontsize=10.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["dtype"]), []).append(row)
    for number, ((method, dtype), points) in enumerate(lines.items()):
        aside = 2 ** (0.03 * (number - len(lines) / 2))
        points = sorted(points, key=lambda row: row["bytes"])
        style, marker = STYLES[dtype]
        alone = method in ("full", "int8")
        axes.errorbar(
            [aside * row["bytes"] for row in points], [100 * row[key]["mean"] for row in points],
            yerr=[100 * (row[key]["std"] or 0) for row in points], linestyle="" if alone else style,
            marker="*" if alone else marker, markersize=11 if alone else 5, color=COLOUR_OF[method], linewidth=1.3,
            capsize=2.5, elinewidth=0.8, markerfacecolor="white" if dtype == "int8" else None,
            label=NAMES[method] + (f", {dtype}" if dtype != "pq" and method != "int8" else ""),
        )
        if (method, dtype) == ("full", "float32"):
            axes.axhline(100 * points[0][key]["mean"], color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)

"""Pictures of early exits: accuracy against multiply-accumulates, and the queries that left first and last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoreid.data import Sample
from autoreid.plots import COLOURS, FRAMES, FRONT, INK, framed_picture, new_figure
from autoreid.ranked import RankedList

STREAMS = {"distance": (COLOURS[0], "-"), "margin": (COLOURS[2], "-"), "random": (COLOURS[8], "--")}


def curve(record: Mapping[str, Any]) -> Figure:
    """mAP and rank-1 over the multiply-accumulates per query of an ``anytime.Study``'s record.

    Steps: what answers when the budget runs out there, the exits' or the ensemble's. Lines: streams that cost so much on
    average, with the standard deviation over the orders in which the queries came.
    """
    figure = new_figure(11.5, 5.2, layout="constrained")
    title = f"{record['model']}\non {record['dataset']}: accuracy against computation"  # names are long
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    panels = figure.subplots(1, 2)
    largest = max(row["macs_run"] for row in (*record["exits"], *record["ensemble"]))
    scale, unit = (1e9, "billion") if largest >= 1e9 else (1e6, "million")
    for axes, name, of in zip(panels, ("mAP (%)", "rank-1 (%)"), (_mean_ap, _rank_1), strict=True):
        _draw(axes, record, scale, of)
        axes.set_ylabel(name, fontsize=10.5)
        axes.set_xlabel(f"MACs per query ({unit}), heads passed on the way included", fontsize=10.5)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=9.5, frameon=False)
    return figure


def _mean_ap(row: Mapping[str, Any]) -> Any:
    return row["mAP"]


def _rank_1(row: Mapping[str, Any]) -> Any:
    return row["cmc"]["1"]


def _draw(axes: Axes, record: Mapping[str, Any], scale: float, of: Callable[[Mapping[str, Any]], Any]) -> None:
    largest = 1.04 * max(row["macs_run"] for row in (*record["exits"], *record["ensemble"])) / scale
    for rows, name, colour, marker in (
        (record["exits"], "exits, the most recent answers", FRONT, "o"),
        (record["ensemble"], "ensemble, the most recent answers", INK, "s"),
    ):
        if rows:
            x = [row["macs_run"] / scale for row in rows]
            y = [100 * of(row) for row in rows]
            axes.step([*x, largest], [*y, y[-1]], where="post", color=colour, linewidth=1.3, alpha=0.45, zorder=2)
            axes.plot(x, y, marker, color=colour, markersize=7, zorder=3, label=name)
    for row in record["exits"]:
        axes.annotate(str(row["exit"]), (row["macs_run"] / scale, 100 * of(row)), xytext=(0, 7), ha="center",
                      textcoords="offset points", fontsize=9, color=FRONT)
    for kind, (colour, line) in STREAMS.items():
        rows = [row for row in record["streams"] if row["confidence"] == kind]
        if rows:
            axes.errorbar(
                [row["macs_run"]["mean"] / scale for row in rows], [100 * of(row)["mean"] for row in rows],
                yerr=[100 * of(row)["std"] for row in rows], color=colour, linestyle=line, marker=".", markersize=6,
                linewidth=1.5, elinewidth=0.8, capsize=2, zorder=4, label=f"stream, {kind}",
            )


def examples(
    easy: Sequence[RankedList],
    hard: Sequence[RankedList],
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    title: str,
    name_of: Callable[[int], str] = str,
    confidence: str = "distance",
) -> Figure:
    """A row per query: its picture and its identity as ``name_of`` has it, then what the gallery answers first at the exit
    where it left. Frames as in ``plots.ranked_lists``. Above those that left at the first exit, below those of the last:
    the surest and the least sure by this confidence, of "random" any."""
    of_easy, of_hard = ("the surest", "the least sure at the first") if confidence != "random" else ("by chance",) * 2
    groups = [(name, lists) for name, lists in (
        (f"Left at the first exit, {of_easy}", easy), (f"Went to the last exit, {of_hard}", hard),
    ) if lists]
    count, depth = len(easy) + len(hard), max((len(ranked.gallery) for _, lists in groups for ranked in lists), default=1)
    figure = new_figure(1.05 * (depth + 1) + 0.6, 2.2 * max(1, count) + 0.5 * len(groups) + 0.8, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    if not groups:
        figure.text(0.5, 0.4, "no query left at the first exit, none went to the last", ha="center")
        return figure
    figure.supxlabel("green: the same identity; red: another; grey: junk, which has no rank", fontsize=9, color="#555555")
    blocks = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[len(lists) for _, lists in groups])[:, 0]
    for block, (name, lists) in zip(blocks, groups, strict=True):
        block.suptitle(name, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        for row, ranked in zip(block.subplots(len(lists), depth + 1, squeeze=False), lists, strict=True):
            for axes in row:
                axes.axis("off")
            asked, rank = query[ranked.query], 0
            framed_picture(row[0], asked.path, INK, 1.0, f"{name_of(asked.identity)}\n{_said(ranked)}")
            for axes, i, kind in zip(row[1:], ranked.gallery, ranked.kinds, strict=False):
                rank += kind != "junk"
                framed_picture(axes, gallery[i].path, FRAMES[kind], 0.35 if kind == "junk" else 1.0,
                               "junk" if kind == "junk" else str(rank))
    return figure


def _said(ranked: RankedList) -> str:
    return "not scored" if ranked.average_precision is None else f"AP {100 * ranked.average_precision:.0f} %"

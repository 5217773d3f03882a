"""What the pictures say and whether their words collide, not their pixels; and the page they go into."""

import html.parser
import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text
from PIL import Image

from autoreid import plots, report
from autoreid.genotype import Genotype

NORMAL = (
    (("sep_conv_3x3", 0), ("part_aware", 1)),
    (("dil_conv_3x3", 2), ("sep_conv_5x5", 0)),
    (("max_pool_3x3", 0), ("identity", 1)),
    (("avg_pool_3x3", 2), ("dil_conv_5x5", 4)),
)
OPERATIONS = ["none", "part_aware", "max_pool_3x3", "sep_conv_3x3", "identity"]


def frame(**changes):
    """A table as compare.table makes it, as far as the pictures look."""
    made = pd.DataFrame({
        "model": ["resnet50", "resnet18", "auto-reid", "shufflenet", "darts_v2"],
        "genotype": [None, None, "g1", None, None],
        "seeds": 3,
        "params": [23_500_000, 11_200_000, 1_300_000, 1_250_000, 1_310_000],
        "macs": [1_330_000_000, 590_000_000, 55_000_000, 48_000_000, 56_000_000],
        "mAP_mean": [0.52, 0.49, 0.46, 0.40, 0.455],
        "mAP_std": [0.02, 0.01, 0.015, np.nan, 0.012],
        "latency_ms": [30.0, 12.0, 14.0, 5.0, np.nan],
        "latency_on": ["cpu, batch 1, Some CPU"] * 4 + [""],
        "dataset": "drawn-people",
        "input": "128x64",
        "mixed": "",
    })  # fmt: skip
    return made.assign(**changes)


FRONT = np.array([True, True, True, True, False])


def texts(figure):
    """Every visible text of a figure, subfigures included."""
    return [artist.get_text() for artist in figure.findobj(Text) if artist.get_visible() and artist.get_text()]


def names(axes):
    return [artist for artist in axes.texts if isinstance(artist, Annotation) and artist.get_text()]


def assert_apart(artists, figure):
    """No two texts share a pixel, and each is inside the figure."""
    figure.draw_without_rendering()
    boxes = {artist.get_text(): artist.get_window_extent() for artist in artists}
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)
    for name, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name


def assert_drawn(figure, path):
    """The PNG opens, is of a decent size and not blank, and nothing else lies beside it."""
    plots.save(figure, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) >= 300
    assert 0.003 < (pixels < 200).mean() < 0.5
    assert [one.name for one in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------- Pareto
def test_pareto_says_what_it_shows(tmp_path):
    figure = plots.pareto(frame(), FRONT, "macs")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "MACs (billion multiply-accumulates) of one 128 x 64 image"
    assert axes.get_ylabel() == "mAP (%), mean ± standard deviation over seeds"
    assert axes.get_title(loc="left") == "drawn-people: quality against cost, 3 seeds per model"
    assert figure.get_supxlabel().startswith("Better is up and to the left.")
    assert sorted(note.get_text() for note in names(axes)) == sorted(frame()["model"])
    assert axes.get_xscale() == "log"  # 1330 / 48 > 8
    assert_drawn(figure, tmp_path / "pareto.png")


@pytest.mark.parametrize("cost, words", [
    ("params", "Parameters (millions)"),
    ("latency_ms", "Latency (ms) on cpu, batch 1 of one 128 x 64 image\nSome CPU"),
])  # fmt: skip
def test_the_other_costs(cost, words):
    assert plots.pareto(frame(), FRONT, cost).axes[0].get_xlabel() == words


def test_places_of_latency_that_differ_are_told():
    mixed = frame(latency_on=["cpu, batch 1", "cuda, batch 1", "cpu, batch 1", "cpu, batch 1", ""])
    assert plots.pareto(mixed, FRONT, "latency_ms").axes[0].get_xlabel() == (
        "Latency (ms per batch), measured in several places"
    )


def test_log_axis_only_above_eightfold():
    near = frame(macs=[8_000_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000])
    assert plots.pareto(near, FRONT, "macs").axes[0].get_xscale() == "linear"
    wide = frame(macs=[8_000_001, 1_000_000, 2_000_000, 3_000_000, 4_000_000])
    assert plots.pareto(wide, FRONT, "macs").axes[0].get_xscale() == "log"


def test_points_bars_and_front_stand_at_the_table_s_values():
    axes = plots.pareto(frame(), FRONT, "macs").axes[0]
    for bar, (_, row) in zip(axes.containers, frame().iterrows(), strict=True):
        point = bar.lines[0]
        assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((row["macs"] / 1e9, 100 * row["mAP_mean"]))
        if np.isnan(row["mAP_std"]):
            assert not bar.has_yerr
        else:
            low, high = bar.lines[2][0].get_segments()[0][:, 1]
            assert (low + high) / 2 == pytest.approx(100 * row["mAP_mean"])
            assert (high - low) / 2 == pytest.approx(100 * row["mAP_std"])
    (front,) = [line for line in axes.lines if line.get_gid() == "front"]
    edge = axes.get_xlim()[1]
    assert front.get_xdata().tolist() == pytest.approx([0.048, 0.055, 0.055, 0.59, 0.59, 1.33, 1.33, edge])
    assert front.get_ydata().tolist() == pytest.approx([40, 40, 46, 46, 49, 49, 52, 52])


@pytest.mark.parametrize("seed", range(4))
def test_names_do_not_overlap_even_in_a_crowd(seed):
    rng = np.random.default_rng(seed)
    count = 14
    crowd = pd.DataFrame({
        "model": [f"some_network_x{i}" for i in range(count)], "genotype": None, "seeds": 3,
        "macs": (10 ** rng.uniform(7, 9.5, count)).astype(int), "mAP_mean": rng.uniform(0.3, 0.6, count),
        "mAP_std": rng.uniform(0, 0.02, count), "latency_on": "", "dataset": "d", "input": "128x64", "mixed": "",
    })  # fmt: skip
    figure = plots.pareto(crowd, np.zeros(count, dtype=bool), "macs")
    assert len(names(figure.axes[0])) == count
    assert_apart(names(figure.axes[0]), figure)


def test_mixed_rows_are_hollow_and_named_so():
    mixed = frame(mixed=["", "", "recipe x (others y)", "", ""])
    figure = plots.pareto(mixed, FRONT)
    assert "Hollow: not comparable with the others." in figure.get_supxlabel()
    faces = [bar.lines[0].get_markerfacecolor() for bar in figure.axes[0].containers]
    assert [face == "white" for face in faces] == [False, False, True, False, False]


def test_one_row_one_seed_and_no_latency(tmp_path):
    one = frame(seeds=1, mAP_std=np.nan, latency_ms=np.nan, latency_on="").iloc[:1]
    figure = plots.pareto(one, [True], "params")
    assert figure.axes[0].get_ylabel() == "mAP (%), one seed"
    assert "1 seed per model" in figure.axes[0].get_title(loc="left")
    assert "no model has this cost" in texts(plots.pareto(one, [False], "latency_ms"))


def test_genotypes_tell_rows_of_one_name_apart():
    twice = frame(model=["auto", "auto", "a", "b", "c"], genotype=["g1", "g2", None, None, None])
    shown = {note.get_text() for note in names(plots.pareto(twice, FRONT).axes[0])}
    assert shown == {"auto (g1)", "auto (g2)", "a", "b", "c"}


def test_pareto_all_has_a_panel_per_cost(tmp_path):
    figure = plots.pareto_all(frame(), {"params": FRONT, "macs": FRONT, "latency_ms": FRONT})
    assert [axes.get_xlabel().split(" ")[0] for axes in figure.axes] == ["Parameters", "MACs", "Latency"]
    assert [len(names(axes)) for axes in figure.axes] == [5, 5, 4]  # one has no latency
    for axes in figure.axes:
        assert_apart(names(axes), figure)
    assert_drawn(figure, tmp_path / "all.png")


# ---------------------------------------------------------------------------------------- cells
def test_cell_names_every_operation_and_state(tmp_path):
    figure = plots.cell(NORMAL, "Normal cell")
    said = texts(figure)
    for word in ["Normal cell", "0: $c_{k-2}$", "1: $c_{k-1}$", "2", "3", "4", "5", "concat  $c_k$"]:
        assert said.count(word) == 1
    for operation, _ in itertools.chain(*NORMAL):
        assert said.count(operation) == 1
    assert_apart([artist for artist in figure.axes[0].texts if artist.get_text()], figure)
    assert_drawn(figure, tmp_path / "cell.png")


@pytest.mark.parametrize("seed", range(4))
def test_boxes_of_random_cells_are_apart_and_hold_their_words(seed):
    rng = np.random.default_rng(seed)
    nodes = tuple(
        tuple((("max_pool_3x3", "sep_conv_5x5")[rng.integers(2)], int(j)) for j in rng.choice(i, 2, replace=False))
        for i in range(2, 2 + rng.integers(1, 7))
    )
    figure = plots.cell(nodes, "Cell")
    figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle")]
    assert len(boxes) == 3 * len(nodes) + 3  # two operations and a state per node; two inputs, one output
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    for text in figure.axes[0].texts:
        if text.get_text() not in ("", "Cell"):
            words = text.get_window_extent()
            assert any(b.x0 < words.x0 and words.x1 < b.x1 and b.y0 < words.y0 and words.y1 < b.y1 for b in boxes)


def test_only_the_nodes_of_concat_lead_to_the_output():
    def arrows(figure):
        return sum(isinstance(artist, Annotation) for artist in figure.axes[0].texts)

    assert arrows(plots.cell(NORMAL, "", concat=(4, 5))) == arrows(plots.cell(NORMAL, "")) - 2


def test_genotype_draws_both_cells(tmp_path):
    figure = plots.genotype(Genotype("reid", NORMAL, NORMAL[:2] + NORMAL[:2], (2, 3, 4, 5)))
    said = texts(figure)
    assert "Genotype of the space reid" in said
    assert "Normal cell" in said and "Reduction cell (halves the map)" in said
    assert said.count("part_aware") == 3
    assert_drawn(figure, tmp_path / "genotype.png")


# ---------------------------------------------------------------------------------------- alphas and curves
def trajectories(nodes=(2, 3), cells=("normal", "reduction"), epochs=4):
    rows = [
        (epoch, cell, f"{i}<-{j}", operation, 0.1 + 0.01 * epoch * k)
        for cell in cells for i in nodes for j in range(i) for k, operation in enumerate(OPERATIONS)
        for epoch in range(epochs)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["epoch", "cell", "edge", "operation", "weight"])


def test_alphas_have_a_panel_per_edge_and_a_shared_legend(tmp_path):
    figure = plots.alphas(trajectories())
    panels = [axes for axes in figure.findobj(lambda a: hasattr(a, "get_xlim")) if axes.get_visible()]
    titles = [axes.get_title() for axes in panels]
    assert titles == 2 * ["0 → 2", "1 → 2", "0 → 3", "1 → 3", "2 → 3"]
    said = texts(figure)
    assert "Normal cell" in said and "Reduction cell" in said
    assert [said.count(operation) for operation in OPERATIONS] == [1] * 5
    line = panels[0].lines[2]
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.12, 0.14, 0.16])
    for k in range(5):  # one colour per operation everywhere
        assert len({axes.lines[k].get_color() for axes in panels}) == 1
    assert len({line.get_color() for line in panels[0].lines}) == 5
    assert_drawn(figure, tmp_path / "alphas.png")


def test_alphas_of_one_cell():
    said = texts(plots.alphas(trajectories(cells=("normal",))))
    assert "Normal cell" in said and "Reduction cell" not in said


def test_curves_have_a_panel_per_filled_numeric_column(tmp_path):
    made = pd.DataFrame({
        "epoch": range(5), "loss": [5.0, 4, 3, 2, 1], "mAP": [None, 0.1, None, 0.3, None], "empty": np.nan,
        "note": list("abcde"),
    })  # fmt: skip
    figure = plots.curves(made, "Search")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["loss", "mAP (%)"]
    assert panels[1].lines[0].get_xdata().tolist() == [1, 3]
    assert panels[1].lines[0].get_ydata().tolist() == pytest.approx([10, 30])
    assert all(axes.get_xlabel() == "epoch" for axes in panels)
    assert_drawn(figure, tmp_path / "curves.png")


def test_pictures_are_the_same_bytes_each_time():
    assert plots.png(plots.pareto(frame(), FRONT)) == plots.png(plots.pareto(frame(), FRONT))


# ---------------------------------------------------------------------------------------- the page
class Page(html.parser.HTMLParser):
    """Tags, attributes and words of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, "tags left open"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_report_is_one_whole_page():
    picture = plots.png(plots.curves(pd.DataFrame({"epoch": [0, 1], "loss": [1.0, 2.0]})))
    shown = pd.DataFrame({"model": ["<b>&", "a"], "mAP %": ["49.3 ± 3.7", "-"], "weight": [0.123456, 2.0]})
    text = report.html(shown, "People & <cars>", {"Fronts, $5": picture}, ["A note with $title & <i>."])
    page = Page(text)
    assert {"<b>&", "People & <cars>", "Fronts, $5", "A note with $title & <i>."} <= set(page.words)
    assert {"49.3 ± 3.7", "0.1235", "How to read this"} <= set(page.words)
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64" and image["alt"] == "Fronts, $5"
    with Image.open(io.BytesIO(report.base64.b64decode(data))) as opened:
        assert opened.format == "PNG"
    assert "http" not in text and not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "th"] == ["text", None, None]


def test_report_without_notes_and_pictures():
    page = Page(report.html(pd.DataFrame({"model": ["a"]}), "T", {}, []))
    assert "Notes" not in page.words and "img" not in [tag for tag, _ in page.tags]


def test_a_comparison_is_written_whole(tmp_path):
    made = frame(mINP_mean=0.2, mINP_std=0.01, embedding_bytes=2048.0, train_seconds=60.0, protocol="cross-camera",
                 recipe="a1b2", init="scratch", flip=False, views=1, frames="mean", rerank=False,
                 expand=False, denominator="scored", edition="")  # fmt: skip
    written = report.write_comparison(tmp_path, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "pareto.png", "report.html"]
    assert [path.name for path in written] == ["comparison.csv", "pareto.png", "report.html"]
    page = Page((tmp_path / "report.html").read_text())
    assert {"Comparison on drawn-people", "auto-reid", "52.0 ± 2.0", "1.33 G"} <= set(page.words)
    assert pd.read_csv(tmp_path / "comparison.csv")["front_macs"].tolist() == FRONT.tolist()


def test_a_search_is_drawn_from_its_records(tmp_path):
    genotype = Genotype("reid", NORMAL, NORMAL, (2, 3, 4, 5))
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    recorded = trajectories(cells=("normal",))
    recorded["edge"] = [f"{edge[-1]}->{edge[0]}" for edge in recorded["edge"]]
    recorded.to_csv(tmp_path / "alphas.csv", index=False)
    (tmp_path / "curves.csv").write_text("epoch,loss_ce,loss_alpha,val_mAP\n0,3.5,,\n1,3.1,,0.25\n")
    written = plots.draw_search(tmp_path)
    assert [path.name for path in written] == ["genotype.png", "alphas.png", "curves.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"


# ---------------------------------------------------------------------------------------- studies
def trial(number, state, value=None, reference=None, steps=(), best=None):
    return {"number": number, "state": state, "value": value, "reference": reference, "steps": list(steps),
            "best_value": best}


TRIALS = [
    trial(0, "finished", 0.5, "base", (0.2, 0.5), 0.5), trial(1, "finished", 0.3, "robust-reid", (0.1, 0.3), 0.5),
    trial(2, "failed", None, "safr", (), 0.5), trial(3, "finished", 0.4, None, (0.1, 0.4), 0.5),
    trial(4, "pruned", None, None, (0.05,), 0.5), trial(5, "finished", 0.7, None, (0.3, 0.7), 0.7),
    trial(6, "running", None, None, (0.6,), 0.7),
]  # fmt: skip


def test_the_history_of_a_study_says_what_became_of_every_trial():
    figure = plots.tune_history(TRIALS, "Study market")
    (axes,) = figure.axes
    drawn = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert drawn == {
        "reference": [[0, 0.5], [1, 0.3]], "finished": [[3, 0.4], [5, 0.7]], "pruned, at its last report": [[4, 0.05]],
        "failed": [[2, 0]],
    }
    (front,) = (line for line in axes.lines if line.get_gid() == "front")
    assert front.get_ydata().tolist() == [0.5] * 5 + [0.7] * 2
    assert {note.get_text() for note in names(axes)} == {"base", "robust-reid"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best so far", *drawn]
    assert "Study market" in texts(figure)
    assert_apart([*names(axes), axes.xaxis.label], figure)
    plots.tune_history([trial(0, "failed")])  # nothing was finished


def test_the_importance_of_every_parameter_is_a_bar():
    shares = {"lr": 0.6, "erase": 0.3, "schedule": 0.1}
    figure = plots.tune_importance(shares)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([60, 30, 10])
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares) and axes.yaxis_inverted()
    assert {"60 %", "30 %", "10 %"} <= set(texts(figure))
    assert "too few finished trials to tell" in texts(plots.tune_importance({}))


def test_a_study_is_drawn_from_its_record(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({
        "study": "market", "counts": {"finished": 4, "pruned": 1, "failed": 1, "lost": 0}, "trials": TRIALS,
        "importance": {"lr": 1.0},
    }))
    written = plots.draw_study(tmp_path)
    assert [path.name for path in written] == ["tune-history.png", "tune-importance.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"


# ---------------------------------------------------------------------------------------- activation density
def test_densities_of_the_same_groups_share_their_names(tmp_path):
    groups = ["stem", "stage1.1", "stage1.2", "stage2.1"]
    rows = {"baseline": dict(zip(groups, [0.25, 0.5, 0.75, 1.0])), "attended": dict(zip(groups, [0.6, 0.5, 0.4, 0.3]))}
    figure = plots.draw_density(rows, tmp_path / "density.png")
    (axes,) = figure.axes
    drawn = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(drawn) == ["baseline", "attended"]
    assert drawn["baseline"].get_xdata().tolist() == [1, 2, 3, 4]
    assert drawn["baseline"].get_ydata().tolist() == pytest.approx([25, 50, 75, 100])
    assert drawn["attended"].get_ydata().tolist() == pytest.approx([60, 50, 40, 30])
    assert drawn["attended"].get_color() != drawn["baseline"].get_color()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "1.1", "1.2", "2.1"]
    borders = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert borders == [1.5, 3.5]
    assert axes.get_ylim() == (0, 102) and "not zero (%)" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "attended"]
    with Image.open(tmp_path / "density.png") as picture:
        assert picture.format == "PNG"


def test_densities_of_unlike_models_share_their_places_only(tmp_path):
    rows = {"a": {"stem": 0.5, "stage1.1": 0.4}, "b": {"stem": 0.5, "stage1.1": 0.3, "stage2.1": 0.2}}
    (axes,) = plots.draw_density(rows, tmp_path / "density.png").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["L1", "L2", "L3"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2], [1, 2, 3]]


def test_the_names_of_a_deep_model_s_groups_are_apart(tmp_path):
    names = ["stem", *(f"stage{i}.{j}" for i, blocks in enumerate((3, 4, 6, 3), 1) for j in range(1, blocks + 1))]
    rows = {f"some_network_x{i}": dict.fromkeys(names, 0.1 * i) for i in range(1, 7)}
    figure = plots.draw_density(rows, tmp_path / "density.png")
    assert_apart(figure.axes[0].get_xticklabels(), figure)
    assert_apart(figure.legends[0].get_texts(), figure)

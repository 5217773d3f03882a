"""What is recorded in the repository agrees with itself, with today's code and with the README."""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from autoreid.compare import count, paired, percent, read_results, table
from autoreid.errors import UserError
from autoreid.genotype import Genotype
from autoreid.network import find_model, parameters
from autoreid.recipe import find_recipe
from autoreid.space import SearchSpace
from autoreid.supernet import derive_cell

ROOT = Path(__file__).parent.parent
SEARCH = ROOT / "searches" / "drawn-people-reid-darts-s0"
RESULTS = ROOT / "results" / "drawn-people"


def test_the_recorded_genotype_follows_from_the_recorded_alphas():
    space, genotype = SearchSpace.load("reid"), Genotype.load(SEARCH / "genotype.json")
    rows = list(csv.DictReader((SEARCH / "alphas.csv").open()))
    last = max(int(row["epoch"]) for row in rows)
    for kind in ("normal", "reduction"):
        weights = [float(r["weight"]) for r in rows if int(r["epoch"]) == last and r["cell"] == kind]
        matrix = [weights[i : i + 7] for i in range(0, len(weights), 7)]
        assert derive_cell(space, matrix) == getattr(genotype, kind)
    assert json.loads((SEARCH / "summary.json").read_text())["genotype"] == genotype.key()


def test_the_results_are_of_todays_recipe_and_networks():
    results = read_results(RESULTS)
    assert {r["recipe"] for r in results} == {find_recipe("drawn").key()}
    searched = SEARCH / "genotype.json"
    specs = {
        "drawn-people-reid-darts-s0": find_model(str(searched)),
        "random-reid-g0": find_model("random-reid", match=searched),
        "random-reid-g1": find_model("random-reid", {"genotype_seed": 1}, match=searched),
        "resnet18-stem3-width6": find_model("resnet18", {"stem": 3}, match=searched),
    }
    for result in results:
        assert result["params"] == parameters(specs[result["model"]].build()), result["model"]
        assert result["environment"]["commit"] and result["environment"]["command"].startswith("autoreid retrain")
    assert {(r["model"], r["seed"]) for r in results} == {(name, seed) for name in specs for seed in (0, 1, 2)}


def test_the_readme_quotes_the_records():
    readme, results = (ROOT / "README.md").read_text(), read_results(RESULTS)
    for row in table(results).to_dict("records"):
        figures = (
            f"({row['model']}) | {count(row['params'])} | {count(row['macs'])} | "
            f"{percent(row['mAP_mean'], row['mAP_std'])} | {percent(row['rank1_mean'], row['rank1_std'])} |"
        )
        assert figures in readme
    text = " ".join(readme.split())
    for other, words in (
        ("random-reid-g0", "{:+.1f} ± {:.1f} and"), ("random-reid-g1", "{:+.1f} ± {:.1f} points"),
        ("resnet18-stem3-width6", "({:+.1f} ± {:.1f})"),
    ):
        gain = paired(results, "drawn-people-reid-darts-s0", other)
        assert words.format(100 * gain["mean"], 100 * gain["std"]) in text
    summary = json.loads((SEARCH / "summary.json").read_text())
    assert f"{summary['device_hours']:.2f} CPU-hours and {summary['peak_memory_bytes'] / 2**30:.2f} GiB" in text


def test_the_readme_quotes_the_drawn_datas_difficulty():
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "results" / "benchmarks" / "drawn_difficulty.json").read_text())["rows"]
    means = {(r["data"], r["name"]): r for r in rows if "seed" not in r}
    for name in ("plain, mean of 3 seeds", "part (4 stripes), mean of 3 seeds", "part minus plain, paired by seed"):
        people, vehicles = (means[kind, name] for kind in ("people", "vehicles"))
        cells = [percent(row["mAP"], row["sd"]) for row in (people, vehicles)]
        assert f"| {cells[0]} | {cells[1]} |" in readme
    background = [r["mAP"] for r in rows if r.get("tested_on") in ("no_box", "no_silhouette")]
    chance = means["people", "chance (random features, 10 draws)"]["mAP"]
    assert max(background) < 1.5 * chance and f"| {100 * max(background):.1f} | not measured |" in readme
    for histogram in ("RGB histogram", "6-stripe histogram", "6-stripe grey-world histogram"):
        assert all(means[kind, histogram]["mAP"] < 0.1 for kind in ("people", "vehicles"))
    assert 0.2 < means["people", "plain, mean of 3 seeds"]["mAP"] < 0.6
    gain = means["people", "part minus plain, paired by seed"]
    assert gain["mAP"] == pytest.approx(sum(gain["gains"]) / 3) and min(gain["gains"]) > gain["sd"]


# ---------------------------------------------------------------------------------------- the tuned recipe
TUNED = ROOT / "results" / "tuned"


def panel(when: str) -> dict[str, list[dict]]:
    """Model to its results by seed, before or after tuning."""
    rows: dict[str, list[dict]] = {}
    for result in sorted(read_results(TUNED / when / "drawn-people"), key=lambda r: (r["model"], r["seed"])):
        rows.setdefault(result["model"], []).append(result)
    return rows


def test_the_tuned_recipe_is_the_studys_best_and_the_panels():
    study = json.loads((TUNED / "drawn-people" / "study.json").read_text())
    path = TUNED / "drawn-people" / "recipe.json"
    recipe, written = find_recipe(str(path)), json.loads(path.read_text())
    finished = [trial for trial in study["trials"] if trial["state"] == "finished"]
    assert study["best"]["mean_rank"] == min(trial["mean_rank"] for trial in finished)
    assert written["provenance"]["trial"] == study["best"]["number"] and written["lr"] == study["best"]["params"]["lr"]
    before, after = panel("before"), panel("after")
    assert set(before) == set(after) == set(study["asked"]["panel"])
    for rows, key in ((before, find_recipe("drawn").key()), (after, recipe.key())):
        for results in rows.values():
            assert [r["seed"] for r in results] == [0, 1, 2] and {r["recipe"] for r in results} == {key}
            assert all(r["environment"]["commit"] for r in results)


def test_the_guide_quotes_the_panel():
    text = (ROOT / "docs" / "training.md").read_text()
    before, after = panel("before"), panel("after")
    for model in before:
        old, new = ([r["mAP"] for r in rows[model]] for rows in (before, after))
        gain = [b - a for a, b in zip(old, new, strict=True)]
        cells = " | ".join(f"{100 * statistics.mean(v):.1f} ± {100 * statistics.stdev(v):.1f}" for v in (old, new, gain))
        assert f"| {model} | {cells} |" in text


def test_the_recorded_anytime_study_is_what_its_guide_quotes():
    guide = " ".join((ROOT / "docs" / "anytime.md").read_text().split())
    of_model = defaultdict(list)
    for path in sorted((ROOT / "results" / "anytime" / "drawn-people").glob("*-anytime/anytime.json")):
        record = json.loads(path.read_text())
        of_model[record["model"]].append(record)
    assert len(of_model) == 3 and all([r["seed"] for r in records] == [0, 1, 2] for records in of_model.values())

    def spread(values, sign=""):
        return f"{100 * statistics.mean(values):{sign}.1f} ± {100 * statistics.stdev(values):.1f}"

    def words(texts):
        return "{}, {} and {}".format(*texts)

    gains, times = defaultdict(list), defaultdict(list)
    for records in of_model.values():  # in the order of the table
        for kind in ("exits", "ensemble"):
            for rows in zip(*(record[kind] for record in records), strict=True):
                scores = (spread([r["mAP"] for r in rows]), spread([r["cmc"]["1"] for r in rows]))
                assert f"| {rows[0]['macs_run']:,} | {scores[0]} | {scores[1]} |" in guide
        for record in records:
            rises = [row["mAP"] for row in record["exits"]]
            assert rises == sorted(rises) and record["fusion"] == sorted(record["fusion"])
        for confidence in ("margin", "distance"):
            for name, of in (("rank1", lambda s: s["cmc"]["1"]["mean"]), ("mAP", lambda s: s["mAP"]["mean"])):
                gains[confidence, name].append(spread([
                    statistics.mean(of(ours) - of(chance) for ours, chance in zip(
                        *([s for s in r["streams"] if s["confidence"] == kind] for kind in (confidence, "random")),
                        strict=True)) for r in records
                ], "+"))
        for part in ("_network", ""):
            ratios = [r["timed"][f"stream{part}_ms"]["mean"] / r["timed"][f"full{part}_ms"]["mean"] for r in records]
            times[part].append(f"{100 * statistics.mean(ratios):.0f} %")
        times["budget"].append(f"{100 * records[0]['timed']['budget'] / records[0]['exits'][-1]['macs_run']:.0f} %")
    assert all(words(texts) in guide for texts in (*gains.values(), *times.values()))


def test_what_anytime_records_is_no_result():
    folder = next((ROOT / "results" / "anytime" / "drawn-people").glob("*-anytime"))
    with pytest.raises(UserError, match="^no results in "):
        read_results(folder)


def test_the_recorded_compression_study_is_what_its_guide_quotes():
    guide = " ".join((ROOT / "docs" / "compression.md").read_text().split())
    [path] = (ROOT / "results" / "compression" / "drawn-people").glob("*/compress.json")
    study = json.loads(path.read_text())

    def spread(values):
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    scores = defaultdict(dict)
    for row in study["rows"]:
        dims, dtype = row["dims"], row["dtype"]
        size = row["bytes"] if dtype == "pq" else dims
        middle = {"full": "", "int8": "-after", "low-rank": f"-lowrank{size}"}.get(row["method"], f"-{row['method']}{size}")
        name = f"{study['model']}{middle}{'-int8' if dtype == 'int8' else ''}"
        records = [json.loads((path.parent / f"{name}-s{seed}.json").read_text()) for seed in range(3)]
        values = [record["mAP"] for record in records]
        assert row["seeds"] == [record["seed"] for record in records] == [0, 1, 2]
        assert row["mAP"]["mean"] == pytest.approx(statistics.mean(values), abs=1e-12)
        assert all(record["embedding"]["bytes"] == row["bytes"] for record in records)
        scores[row["method"], dtype][size] = values
    full, trained = spread(scores["full", "float32"][256]), spread(scores["full", "int8"][256])
    assert f"has {full} in float32, {trained} trained in int8" in guide
    assert f"and {spread(scores['int8', 'int8'][256])} rounded to int8 after training" in guide
    for (method, _), sizes in scores.items():
        if method not in ("full", "int8"):
            assert " | ".join(spread(sizes[size]) for size in (128, 64, 32, 8)) in guide

    def lost(method, size, dtype="float32"):
        means = [statistics.mean(values) for values in (scores["full", "float32"][256], scores[method, dtype][size])]
        return f"{100 * (means[0] - means[1]):.1f}"

    assert (lost("slice", 128), lost("prune", 32), lost("full", 256, "int8"), lost("pca", 32), lost("pq", 8, "pq"),
            lost("prune", 8, "int8")) == ("4.7", "5.5", "1.8", "1.3", "11.3", "29.8")

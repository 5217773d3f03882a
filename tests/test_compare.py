"""The table, the refusals word by word, and the fronts by hand and by brute force."""

import copy
import doctest
import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest

from autoreid import compare
from autoreid.compare import format_table, paired, pareto_front, read_results, table, to_csv
from autoreid.errors import UserError


def result(model="resnet18", seed=0, mAP=0.5, **changes):
    """A result JSON as the contract has it."""
    made = {
        "model": model, "genotype": None, "dataset": "drawn-people", "protocol": "cross-camera", "recipe": "a1b2",
        "input": [128, 64], "seed": seed, "init": "scratch", "params": 11_000_000, "macs": 590_000_000,
        "embedding": {"dims": 512, "dtype": "float32", "bytes": 2048}, "mAP": mAP, "mAP_trapezoid": mAP, "mINP": 0.2,
        "cmc": {"1": 0.6, "5": 0.8, "10": 0.9}, "queries": {"total": 10, "scored": 10}, "flip": False,
        "rerank": False, "latency_ms": {"device": "cpu", "batch": 1, "median": 12.0, "iqr": 1.0},
        "train": {"epochs": 60, "seconds": 100.0, "images_per_second": 50.0, "peak_memory_bytes": 1, "device": "cpu"},
        "environment": {"python": "3.11", "processor": "Some CPU"},
    }  # fmt: skip
    return {**made, **changes}


def write(folder, name, value):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def words(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- reading
def test_results_are_read_by_name_and_know_their_file(tmp_path):
    write(tmp_path, "b-s0.json", result("b"))
    write(tmp_path, "a-s0.json", result("a"))
    write(tmp_path, "recipe.json", {"epochs": 60, "recipe": "a1b2", "dataset": "drawn-people", "seed": 0})
    write(tmp_path, "list.json", [1, 2])
    write(tmp_path, "comparison.csv", "not,json")
    found = read_results(tmp_path)
    assert [one["model"] for one in found] == ["a", "b"]
    assert found[0] == {**result("a"), "file": str(tmp_path / "a-s0.json")}


def test_no_folder_and_no_results(tmp_path):
    assert words(read_results, tmp_path / "none") == (
        f"no folder {tmp_path}/none: give the folder of one dataset's results, such as results/drawn-people"
    )
    assert words(read_results, tmp_path) == (
        f"no results in {tmp_path}: `autoreid retrain MODEL --dataset NAME` writes one"
    )


def test_a_cut_file_is_named(tmp_path):
    path = write(tmp_path, "a-s0.json", json.dumps(result())[:50])
    found = words(read_results, tmp_path)
    assert found.startswith(f"{path} is damaged: not valid JSON (") and found.endswith("; delete it or write it again")


@pytest.mark.parametrize("changes, fault", [
    ({"mAP": 49.3}, "mAP is 49.3, must be a fraction in [0, 1]"),
    ({"mAP": math.nan}, "mAP is nan, must be a fraction in [0, 1]"),
    ({"mINP": None}, "mINP is None, must be a fraction in [0, 1]"),
    ({"cmc": {"1": "0.3"}}, "cmc 1 is '0.3', must be a fraction in [0, 1]"),
    ({"cmc": 0.3}, "cmc is 0.3, must be an object of rank and fraction"),
    ({"params": 1.5}, "params is 1.5, must be a whole number from 0"),
    ({"seed": True}, "seed is True, must be a whole number from 0"),
    ({"model": None}, "model is None, must be a name"),
    ({"genotype": {}}, "genotype is {}, must be a key or null"),
    ({"input": "128x64"}, "input is '128x64', must be [height, width]"),
    ({"train": 3}, "train is 3, must be an object or null"),
    ({"latency_ms": {"median": 3}}, "latency_ms is {'median': 3}, must have device, batch and median"),
])  # fmt: skip
def test_a_damaged_value_is_named(tmp_path, changes, fault):
    path = write(tmp_path, "a-s0.json", result(**changes))
    assert words(read_results, tmp_path) == f"{path} is damaged: {fault}; delete it or write it again"


def test_a_result_that_lost_keys_is_damaged_not_passed_over(tmp_path):
    lost = result()
    del lost["mAP"], lost["cmc"]
    path = write(tmp_path, "a-s0.json", lost)
    assert words(read_results, tmp_path) == (
        f"{path} is damaged: mAP and cmc missing; delete it or write it again"
    )


# ---------------------------------------------------------------------------------------- the table
def test_a_row_is_mean_and_sample_deviation_over_seeds():
    scores = [0.5, 0.53, 0.58]
    found = table([
        result(seed=seed, mAP=mAP, latency_ms={"device": "cpu", "batch": 1, "median": ms, "iqr": 0})
        for seed, mAP, ms in zip([0, 1, 2], scores, [10, 30, 11], strict=True)
    ])  # fmt: skip
    assert len(found) == 1
    row = found.iloc[0]
    assert row["seeds"] == 3 and row["params"] == 11_000_000 and row["macs"] == 590_000_000
    assert row["mAP_mean"] == pytest.approx(statistics.mean(scores), abs=1e-12)
    assert row["mAP_std"] == pytest.approx(statistics.stdev(scores), abs=1e-12)
    assert row["rank1_mean"] == 0.6 and row["rank5_mean"] == 0.8 and row["rank10_mean"] == 0.9
    assert row["mINP_mean"] == pytest.approx(0.2) and row["mINP_std"] == pytest.approx(0)
    assert row["latency_ms"] == 11 and row["latency_on"] == "cpu, batch 1, Some CPU"
    assert row["embedding_bytes"] == 2048 and row["train_seconds"] == 100 and row["train_epochs"] == 60
    assert row["mixed"] == "" and row["input"] == "128x64"


def test_the_columns():
    assert list(table([result()])) == [
        "model", "genotype", "seeds", "params", "macs", "mAP_mean", "mAP_std", "rank1_mean", "rank1_std",
        "rank5_mean", "rank5_std", "rank10_mean", "rank10_std", "mINP_mean", "mINP_std", "latency_ms", "latency_on",
        "embedding_bytes", "train_seconds", "train_epochs", "dataset", "edition", "protocol", "recipe", "input", "init",
        "flip", "views", "frames", "rerank", "expand", "denominator", "mixed",
    ]  # fmt: skip


def test_one_seed_has_no_deviation():
    assert math.isnan(table([result()])["mAP_std"][0])


def test_genotypes_of_one_name_are_rows_of_their_own_and_the_best_is_first():
    found = table([result("auto", mAP=0.4, genotype="g1"), result("auto", mAP=0.6, genotype="g2"), result(mAP=0.5)])
    assert list(found["model"]) == ["auto", "resnet18", "auto"]
    assert list(found["genotype"].astype(object).where(found["genotype"].notna(), None)) == ["g2", None, "g1"]


def test_results_may_lack_what_only_training_or_timing_knows():
    row = table([result(latency_ms=None, train=None, embedding=None)]).iloc[0]
    assert all(math.isnan(row[name]) for name in ("latency_ms", "train_seconds", "train_epochs", "embedding_bytes"))
    assert row["latency_on"] == ""


def test_latencies_of_two_processors_have_no_median():
    other = result(seed=1, environment={"processor": "Other CPU"})
    row = table([result(), other]).iloc[0]
    assert math.isnan(row["latency_ms"])
    assert row["latency_on"] == "cpu, batch 1, Other CPU and cpu, batch 1, Some CPU"


def test_no_results_to_compare():
    assert words(table, []) == "no results to compare: `autoreid retrain MODEL --dataset NAME` writes one"


# ---------------------------------------------------------------------------------------- refusals
RETRAIN, EVALUATE = "retrain one of them with the same", "evaluate one of them again with the same"
AGAIN = " (`autoreid evaluate WEIGHTS ... --out RESULT.json --overwrite` writes its file anew)"


@pytest.mark.parametrize("changes, name, ours, theirs, cure", [
    ({"dataset": "market1501"}, "dataset", "'drawn-people'", "'market1501'",
     "compare the results of one dataset at a time"),
    ({"protocol": "vehicleid"}, "protocol", "'cross-camera'", "'vehicleid'", f"{EVALUATE} protocol{AGAIN}"),
    ({"recipe": "ffff"}, "recipe", "'a1b2'", "'ffff'", f"{RETRAIN} recipe"),
    ({"input": [256, 128]}, "input", "'128x64'", "'256x128'", f"{RETRAIN} input"),
    ({"init": "imagenet"}, "init", "'scratch'", "'imagenet'", f"{RETRAIN} init"),
    ({"flip": True}, "views", "1", "2", f"{EVALUATE} views{AGAIN}"),
    ({"flip": False, "views": 10}, "views", "1", "10", f"{EVALUATE} views{AGAIN}"),
    ({"frames": "max"}, "frames", "'mean'", "'max'", f"{EVALUATE} frames{AGAIN}"),
    ({"denominator": "all"}, "denominator", "'scored'", "'all'", f"{EVALUATE} denominator{AGAIN}"),
    ({"rerank": True}, "rerank", "False", "True", f"{EVALUATE} rerank{AGAIN}"),
    ({"expand": {"k": 3, "alpha": 0.0}}, "expand", "False", "'{\"alpha\": 0.0, \"k\": 3}'", f"{EVALUATE} expand{AGAIN}"),
    ({"unreadable": 1}, "unreadable", "0", "1", "copy the images again that one of them left out, and evaluate it again"),
    ({"train": {"epochs": 10}}, "train epochs", "60", "10", f"{RETRAIN} train epochs"),
])  # fmt: skip
def test_rows_that_are_not_comparable_are_refused(changes, name, ours, theirs, cure):
    pair = [result(file="r/a.json"), result("other", file="r/b.json", **changes)]
    assert words(table, pair) == (
        f"results are not comparable: {name} is {ours} in r/a.json but {theirs} in r/b.json; {cure}, "
        "or mark such rows with --allow-mixed"
    )


def test_splits_are_compared_where_both_tell():
    ours, theirs = result(file="a", split="750 train"), result("b", file="b", split="700 train")
    assert words(table, [result("silent"), ours, theirs]) == (
        "results are not comparable: split is '750 train' in a but '700 train' in b; check that both saw the same "
        "copy of the dataset and retrain one of them, or mark such rows with --allow-mixed"
    )
    assert len(table([ours, result("silent")])) == 2


@pytest.mark.parametrize(("name", "cure"), [
    ("edition", "compare results on one edition"),
    ("fingerprint", "they were tested on other lists of images: compare results on one copy of the data, or evaluate one "
     "of them again on the other's"),
    ("train_fingerprint", "they were trained on other lists of images: retrain one of them on the other's"),
])
def test_other_data_of_the_same_name_is_refused_where_both_tell(name, cure):
    """Two folders of one's own are both called folder, and MSMT17 is V1 or V2; results recorded before say neither."""
    ours, theirs = result(file="a", **{name: "one"}), result(seed=1, file="b", **{name: "two"})
    assert words(table, [result("silent"), ours, theirs]) == (
        f"results are not comparable: {name} is 'one' in a but 'two' in b; {cure}, or mark such rows with --allow-mixed"
    )
    assert len(table([result("silent"), ours, result("other", **{name: "one"}), result("none", **{name: None})])) == 4
    silent = [result("silent", seed) for seed in range(3)]
    marked = table([*silent, ours, result("other", **{name: "one"}), theirs], allow_mixed=True)
    assert sorted(marked["mixed"]) == ["", "", "", f"{name} two (others one)"]


def test_a_model_trained_elsewhere_is_not_comparable():
    away = result("b", file="b", trained_on="market1501")
    assert words(table, [result(file="a"), away]) == (
        "results are not comparable: trained on is 'drawn-people' in a but 'market1501' in b; "
        "compare models trained on one dataset, or mark such rows with --allow-mixed"
    )


def test_settings_of_several_parts_are_compared_whatever_their_order():
    one, other = {"k1": 20, "k2": 6}, {"k2": 6, "k1": 20}
    assert len(table([result("a", rerank=one), result("b", rerank=other)])) == 2
    assert "rerank is" in words(table, [result("a", rerank=one), result("b", rerank={"k1": 5})])


def test_refused_within_one_model_too():
    assert "recipe is 'a1b2'" in words(table, [result(), result(seed=1, recipe="x")])


def test_mixed_rows_are_marked_against_the_most_common_settings():
    odd = result("odd", mAP=0.9, recipe="x", input=[256, 128])
    found = table([odd, result("a", seed=0), result("a", seed=1)], allow_mixed=True)
    assert list(found["model"]) == ["odd", "a"]
    assert list(found["mixed"]) == ["recipe x (others a1b2); input 256x128 (others 128x64)", ""]
    assert list(pareto_front(found)) == [False, True]  # better by other means does not count


def test_mixed_seeds_of_one_model_are_not_averaged():
    found = table([result(seed=0), result(seed=1), result(seed=0, recipe="x")], allow_mixed=True)
    assert sorted(found["seeds"]) == [1, 2]


@pytest.mark.parametrize("allow_mixed", [False, True])
def test_one_seed_twice(allow_mixed):
    twice = [result(file="a.json"), result(file="b.json")]
    assert words(table, twice, allow_mixed) == (
        "seed 0 of resnet18 appears twice: in a.json and in b.json; delete one of them, or train with another --seed"
    )


@pytest.mark.parametrize("name", ["params", "macs"])
def test_one_name_for_two_networks(name):
    pair = [result(file="a.json", **{name: 5}), result(seed=1, file="b.json", **{name: 7})]
    assert words(table, pair) == (
        f"resnet18 is not one network: {name} is 5 in a.json but 7 in b.json; "
        "give one of them another model name, or retrain it"
    )


# ---------------------------------------------------------------------------------------- fronts
def points(*pairs):
    return pd.DataFrame(pairs, columns=["macs", "mAP_mean"])


@pytest.mark.parametrize("pairs, front", [
    ([(1, 0.5)], [1]),
    ([(1, 0.5), (2, 0.6)], [1, 1]),  # dearer and better
    ([(1, 0.5), (2, 0.4)], [1, 0]),  # dearer and worse
    ([(1, 0.5), (2, 0.5)], [1, 0]),  # as good, dearer
    ([(1, 0.5), (1, 0.4)], [1, 0]),  # as dear, worse
    ([(1, 0.5), (1, 0.5)], [1, 1]),  # alike
    ([(1, 0.5), (1, 0.5), (1, 0.6)], [0, 0, 1]),
    ([(3, 0.9), (1, 0.5), (2, 0.7), (2, 0.6), (4, 0.9), (0, 0.1)], [1, 1, 1, 0, 0, 1]),
    ([(math.nan, 0.9), (1, math.nan), (2, 0.1)], [0, 0, 1]),
    ([(0, math.inf), (2, 0.1)], [0, 1]),
    ([], []),
])  # fmt: skip
def test_front_truth_table(pairs, front):
    assert list(pareto_front(points(*pairs))) == [bool(one) for one in front]


def brute_front(pairs):
    """Slow twin: ask every other point."""
    def beats(p, q):
        return p[0] <= q[0] and p[1] >= q[1] and p != q
    return [not any(beats(p, q) for p in pairs) for q in pairs]


def test_front_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pairs = [tuple(map(int, pair)) for pair in rng.integers(0, 6, size=(int(rng.integers(1, 15)), 2))]
        assert list(pareto_front(points(*pairs))) == brute_front(pairs)


def test_front_is_the_same_in_any_order():
    rng = np.random.default_rng(1)
    frame = points(*rng.integers(0, 9, size=(30, 2)).tolist())
    mask, order = pareto_front(frame), rng.permutation(30)
    assert list(pareto_front(frame.iloc[order])) == list(mask[order])


def test_latency_front_holds_only_rows_measured_in_one_place():
    gpu = {"device": "cuda", "batch": 1, "median": 1.0, "iqr": 0.0}
    found = table([result("a", mAP=0.5), result("b", mAP=0.4), result("c", mAP=0.3, latency_ms=gpu)])
    assert list(pareto_front(found, "latency_ms")) == [True, False, False]
    assert list(pareto_front(found, "macs")) == [True, False, False]


def test_unknown_cost():
    assert words(pareto_front, points((1, 1)), "mac") == (
        "unknown cost 'mac'; did you mean 'macs'? known: latency_ms, macs, params"
    )


# ---------------------------------------------------------------------------------------- paired
def test_paired_differences_over_common_seeds():
    a = [result("a", seed, mAP) for seed, mAP in [(0, 0.50), (1, 0.60), (2, 0.55), (7, 0.99)]]
    b = [result("b", seed, mAP) for seed, mAP in [(2, 0.50), (0, 0.48), (1, 0.57), (8, 0.01)]]
    found = paired(a + b, "a", "b")
    differences = [0.02, 0.03, 0.05]
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(statistics.mean(differences))
    assert found["std"] == pytest.approx(statistics.stdev(differences))
    assert paired(a + b, "b", "a")["mean"] == -found["mean"]
    assert math.isnan(paired([a[0], b[1]], "a", "b")["std"])


def test_paired_refusals():
    some = [result("a", 0), result("b", 1), result("auto", 0, genotype="g1"), result("auto", 1, genotype="g2")]
    assert words(paired, some, "a", "b") == (
        "no common seed: a has seeds 0, b has seeds 1; train one of them with a --seed of the other"
    )
    assert words(paired, some, "a", "bb") == "unknown model 'bb'; did you mean 'b'? known: a, auto, b"
    assert words(paired, some, "a", "auto") == (
        "'auto' names several rows: auto with genotype g1, auto with genotype g2; "
        "give a name that only one of them has"
    )
    assert paired(some, "a", "g1")["n"] == 1
    assert "not comparable" in words(paired, [result("a"), result("b", recipe="x")], "a", "b")


# ---------------------------------------------------------------------------------------- words and files
SMALL = [
    result("resnet18", 0, 0.4562), result("resnet18", 1, 0.5300),
    result("shuffle", 0, 0.4, params=1_404_000, macs=131_100_000,
           latency_ms={"device": "cpu", "batch": 1, "median": 5.25, "iqr": 1.0}),
    result("fat", 0, 0.3, params=47_100, macs=1_680_592_374, latency_ms=None),
]  # fmt: skip


TERMINAL = """
front  model     seeds  params    MACs       mAP %    rank-1 %    rank-5 %   rank-10 %      mINP %    ms  bytes  train s
------------------------------------------------------------------------------------------------------------------------
PML    resnet18      2    11 M   590 M  49.3 ± 5.2  60.0 ± 0.0  80.0 ± 0.0  90.0 ± 0.0  20.0 ± 0.0    12   2048      100
PML    shuffle       1   1.4 M   131 M        40.0        60.0        80.0        90.0        20.0  5.25   2048      100
P      fat           1  47.1 k  1.68 G        30.0        60.0        80.0        90.0        20.0     -   2048      100

drawn-people: protocol cross-camera, input 128x64, init scratch, recipe a1b2, views 1, rerank off, expand off.
Scores: mean ± sample standard deviation over seeds, in percent. MACs: multiply-accumulates of one image.
Front (P by parameters, M by MACs, L by latency): no other row is as cheap and as good, and better in one.
Milliseconds per batch on cpu, batch 1, Some CPU.
"""


def test_the_table_in_the_terminal():
    assert format_table(table(SMALL)) == TERMINAL.strip()


def test_the_text_is_sorted_whatever_the_table():
    shuffled = table(SMALL).iloc[[2, 0, 1]]
    assert format_table(shuffled) == format_table(table(SMALL))


def test_the_footer_says_how_was_evaluated_and_on_what():
    how = {"views": 10, "flip": True, "frames": "max", "expand": {"k": 10, "alpha": 3.0}, "denominator": "all",
           "rerank": {"k1": 20, "k2": 6, "lambda": 0.3}, "dataset": "msmt17", "edition": "MSMT17_V2"}
    assert (
        "msmt17 (MSMT17_V2): protocol cross-camera, input 128x64, init scratch, recipe a1b2, views 10, rerank k1=20 k2=6 "
        "lambda=0.3, expand alpha=3.0 k=10, frames max, denominator all.") in format_table(table([result(**how)]))


def test_a_result_without_reranking_is_one_however_it_says_so():
    assert len(table([result("a", rerank=False), result("b", rerank=None, expand=None)])) == 2


def test_marks_of_mixed_rows_and_places():
    gpu = {"device": "cuda", "batch": 1, "median": 1.0, "iqr": 0.0}
    text = format_table(table([*SMALL, result("odd", recipe="x", latency_ms=gpu)], allow_mixed=True))
    assert "odd*" in text
    assert "* odd is not comparable: recipe x (others a1b2); it takes no part in the fronts." in text
    assert "Milliseconds per batch on cpu, batch 1, Some CPU: resnet18, shuffle." in text
    assert "Milliseconds per batch on cuda, batch 1: odd." in text
    assert "Latencies from different places are not comparable; the front is that of the commonest." in text


def test_genotypes_are_shown_where_a_name_repeats():
    assert "genotype" not in compare.readable(table(SMALL))
    found = compare.readable(table([result("auto", genotype="g1"), result("auto", genotype="g2")]))
    assert sorted(found["genotype"]) == ["g1", "g2"]


def test_csv_reads_back(tmp_path):
    made = table(SMALL)
    to_csv(made, tmp_path / "comparison.csv")
    found = pd.read_csv(tmp_path / "comparison.csv")
    assert list(found["model"]) == list(made["model"])
    assert found["mAP_mean"].tolist() == made["mAP_mean"].tolist()  # every digit
    assert found["front_macs"].tolist() == [True, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.csv"]


def test_nothing_is_changed_or_printed(capsys):
    given = copy.deepcopy(SMALL)
    made = table(given)
    before = made.copy()
    format_table(made), pareto_front(made), compare.readable(made)
    pd.testing.assert_frame_equal(made, before)
    assert given == SMALL
    assert capsys.readouterr().out == ""


def test_the_examples():
    failed, tried = doctest.testmod(compare)
    assert tried and not failed

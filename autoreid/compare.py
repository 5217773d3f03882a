"""Compare measured models: one row per model over its seeds, and the rows that no other row beats.

A comparison is only worth its sameness: rows are refused unless they share dataset, protocol, recipe, input size and
all else that moves a score without moving the model. A single run says little (the DARTS authors call it misleading),
so a row is a mean and a sample standard deviation over seeds. Everything here returns a table or a text; ``plots.py``
draws. Metrics are fractions in [0, 1] in every table and file; percent appears in :func:`readable` and after it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autoreid.errors import UserError, unknown
from autoreid.runs import write_text

Result = Mapping[str, Any]

COSTS = ("params", "macs", "latency_ms")
LETTERS = {"params": "P", "macs": "M", "latency_ms": "L"}

# A result file has all of these; a file with fewer than half of them is something else (recipe.json).
REQUIRED = (
    "model", "genotype", "dataset", "protocol", "recipe", "input", "seed", "init", "params", "macs", "mAP", "mINP",
    "cmc", "flip", "rerank",
)  # fmt: skip
RETRAIN = "retrain one of them with the same {name}"
EVALUATE = ("evaluate one of them again with the same {name} (`autoreid evaluate WEIGHTS ... --out RESULT.json "
            "--overwrite` writes its file anew)")
# What must agree between rows, and what to do where it does not.
SETTINGS = {
    "dataset": "compare the results of one dataset at a time",
    "edition": "compare results on one edition",
    "fingerprint": "they were tested on other lists of images: compare results on one copy of the data, or evaluate one of "
                   "them again on the other's",
    "protocol": EVALUATE,
    "recipe": RETRAIN,
    "input": RETRAIN,
    "init": RETRAIN,
    "views": EVALUATE,
    "frames": EVALUATE,
    "expand": EVALUATE,
    "denominator": EVALUATE,
    "rerank": EVALUATE,
    "unreadable": "copy the images again that one of them left out, and evaluate it again",
    "trained on": "compare models trained on one dataset",
    "train_fingerprint": "they were trained on other lists of images: retrain one of them on the other's",
    "split": "check that both saw the same copy of the dataset and retrain one of them",
    "train epochs": RETRAIN,
    "batch_parts": "their batches were cut into other numbers of parts, each with its own statistics: retrain one of them "
                   "by as many processes, or both with sync_bn=true",
}
OPTIONAL = ("edition", "fingerprint", "train_fingerprint", "split", "train epochs")  # compared where both results tell
SHOWN = ("dataset", "edition", "protocol", "recipe", "input", "init", "flip", "views", "frames", "rerank", "expand",
         "denominator")  # as columns


# ---------------------------------------------------------------------------------------- reading
def result_folder(folder: str | Path) -> Path:
    """``folder`` if it holds JSON files or no folder of results, else its one folder of results.

    ``results/`` holds a folder per dataset: with several the :class:`UserError` lists them.
    """
    folder = Path(folder)
    if not folder.is_dir() or any(folder.glob("*.json")):
        return folder
    inside = sorted(child for child in folder.iterdir() if any(_read(path) for path in child.glob("*.json")))
    if len(inside) > 1:
        raise UserError(f"{folder} holds results of several datasets: give one of {', '.join(map(str, inside))}")
    return inside[0] if inside else folder


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The result files ``*.json`` of a folder ``results/<dataset>``, by name, each with its path under ``"file"``.

    Other JSON files are passed over (they lack the keys of a result). A missing folder, a folder without results and
    a damaged file are a :class:`UserError` that names it and the fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder of one dataset's results, such as results/drawn-people")
    results = []
    for path in sorted(folder.glob("*.json")):
        result = _read(path)
        if result is not None:
            results.append({**result, "file": str(path)})
    if not results:
        raise UserError(f"no results in {folder}: `autoreid retrain MODEL --dataset NAME` writes one")
    return results


def _read(path: Path) -> dict[str, Any] | None:
    """The checked result in ``path``, or None if the file is no result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({error}); delete it or write it again") from None
    if not isinstance(result, dict) or "streams" in result:  # what `autoreid anytime` records is no result
        return None
    missing = [name for name in REQUIRED if name not in result]
    if len(missing) > len(REQUIRED) / 2:
        return None
    fault = f"{' and '.join(missing)} missing" if missing else _fault(result)
    if fault:
        raise UserError(f"{path} is damaged: {fault}; delete it or write it again")
    return result


def _fault(result: Result) -> str | None:
    """What is wrong with the values of a result that has all its keys, or None."""
    if not isinstance(result["cmc"], dict):
        return f"cmc is {result['cmc']!r}, must be an object of rank and fraction"
    fractions = {"mAP": result["mAP"], "mINP": result["mINP"]}
    fractions |= {f"cmc {rank}": value for rank, value in result["cmc"].items()}
    for name, value in fractions.items():
        if not _is_number(value) or not 0 <= value <= 1:
            return f"{name} is {value!r}, must be a fraction in [0, 1]"
    for name in ("params", "macs", "seed"):
        if type(result[name]) is not int or result[name] < 0:
            return f"{name} is {result[name]!r}, must be a whole number from 0"
    if not isinstance(result["model"], str):
        return f"model is {result['model']!r}, must be a name"
    if not isinstance(result["genotype"], (str, type(None))):
        return f"genotype is {result['genotype']!r}, must be a key or null"
    size = result["input"]
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int for side in size):
        return f"input is {size!r}, must be [height, width]"
    for name in ("embedding", "latency_ms", "train"):
        if not isinstance(result.get(name), (dict, type(None))):
            return f"{name} is {result[name]!r}, must be an object or null"
    latency = result.get("latency_ms")
    if latency and not ({"device", "batch"} <= latency.keys() and _is_number(latency.get("median"))):
        return f"latency_ms is {latency!r}, must have device, batch and median"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------- what must agree
def _settings(result: Result) -> dict[str, Any]:
    """The values that must agree between rows, by the names of ``SETTINGS``; input as "HxW"."""
    train = result.get("train") or {}
    values = {
        **{name: result[name] for name in ("dataset", "protocol", "recipe", "init", "flip")},
        **{name: result.get(name) for name in ("edition", "fingerprint", "train_fingerprint")},
        "views": result.get("views") or 1 + bool(result["flip"]),  # older results only know the mirror image
        "frames": result.get("frames", "mean"),
        "rerank": result["rerank"] or False,  # None in newer results
        "expand": result.get("expand") or False,
        "denominator": result.get("denominator", "scored"),
        "unreadable": result.get("unreadable", 0),
        "input": "x".join(map(str, result["input"])),
        "trained on": result.get("trained_on") or result["dataset"],
        "split": result.get("split"),
        "train epochs": train.get("epochs"),
        "batch_parts": result.get("batch_parts", 1),
    }
    # A value of several parts (the constants of a re-ranking) is held as its JSON, which compares and hashes.
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value
        for name, value in values.items()
    }


def _disagree(name: str, one: Any, other: Any) -> bool:
    return one != other and not (name in OPTIONAL and (one is None or other is None))


def _file(result: Result) -> str:
    return result.get("file", f"{result['model']} seed {result['seed']}")


def check_comparable(results: Sequence[Result]) -> None:
    """Raise a :class:`UserError` where two results may not share a table: both values, both files and the cure."""
    for name, cure in SETTINGS.items():
        told = [result for result in results if not (name in OPTIONAL and _settings(result)[name] is None)]
        for result in told[1:]:
            ours, theirs = _settings(told[0])[name], _settings(result)[name]
            if ours != theirs:
                raise UserError(
                    f"results are not comparable: {name} is {ours!r} in {_file(told[0])} but {theirs!r} in "
                    f"{_file(result)}; {cure.format(name=name)}, or mark such rows with --allow-mixed"
                )


def _standard(results: Sequence[Result]) -> dict[str, Any]:
    """The settings of most results (the first of equals): what the other rows are marked against."""
    told = Counter(tuple(_settings(result).items()) for result in results)
    standard = dict(max(told.items(), key=lambda item: item[1])[0])
    for name in OPTIONAL:  # what most of them do not tell, the commonest among the others
        values = Counter(value for result in results if (value := _settings(result)[name]) is not None)
        if standard[name] is None and values:
            standard[name] = max(values.items(), key=lambda item: item[1])[0]
    return standard


# ---------------------------------------------------------------------------------------- the table
def table(results: Sequence[Result], allow_mixed: bool = False) -> pd.DataFrame:
    """One row per (model, genotype key) over its seeds, best mean mAP first.

    Columns: model, genotype, seeds (how many), params, macs; mAP_mean and mAP_std, and so for rank1, rank5, rank10
    and mINP (fractions; sample standard deviation, NaN with one seed); latency_ms (median over seeds of the medians,
    NaN where not measured or measured on different things) and latency_on (device, batch, processor and threads);
    embedding_bytes (per image), file_bytes (of exported networks, where there are any), train_seconds
    (mean over seeds), train_epochs; the settings in ``SHOWN``, input as "HxW";
    and mixed: why the row is not comparable with the others, "" where it is.

    Results whose settings differ are refused (:func:`check_comparable`), or with ``allow_mixed`` become rows of their
    own, marked against the settings most results have. Always refused: one seed twice in a row, and seeds of a row
    that do not have the same parameters or MACs.
    """
    if not results:
        raise UserError("no results to compare: `autoreid retrain MODEL --dataset NAME` writes one")
    if not allow_mixed:
        check_comparable(results)
    standard = _standard(results)
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        settings = _settings(result)
        differences = tuple(
            f"{name} {settings[name]} (others {standard[name]})"
            for name in SETTINGS
            if _disagree(name, settings[name], standard[name])
        )
        groups.setdefault((result["model"], result["genotype"], "; ".join(differences)), []).append(result)
    ranks = sorted({int(rank) for result in results for rank in result["cmc"]})
    rows = [_row(group, ranks, mixed) for (_, _, mixed), group in groups.items()]
    return pd.DataFrame(rows).sort_values(["mAP_mean", "model"], ascending=[False, True], ignore_index=True)


def _row(group: Sequence[Result], ranks: Iterable[int], mixed: str) -> dict[str, Any]:
    """The row of one model's results, one per seed."""
    _check_one_network(group)
    first, settings = group[0], _settings(group[0])
    row: dict[str, Any] = {name: first[name] for name in ("model", "genotype")}
    row |= {"seeds": len(group), "params": first["params"], "macs": first["macs"]}
    metrics = {"mAP": [result["mAP"] for result in group]}
    metrics |= {f"rank{rank}": [result["cmc"].get(str(rank), math.nan) for result in group] for rank in ranks}
    metrics |= {"mINP": [result["mINP"] for result in group]}
    for name, values in metrics.items():
        row[f"{name}_mean"], row[f"{name}_std"] = _mean_and_std(values)
    row["latency_ms"], row["latency_on"] = _latency(group)
    row["embedding_bytes"] = (first.get("embedding") or {}).get("bytes", math.nan)
    if "export" in first:
        row["file_bytes"] = first["export"]["file"]["bytes"]
    seconds = [train["seconds"] for result in group if "seconds" in (train := result.get("train") or {})]
    row["train_seconds"] = float(statistics.mean(seconds)) if seconds else math.nan
    row["train_epochs"] = math.nan if settings["train epochs"] is None else settings["train epochs"]
    row |= {name: settings[name] for name in SHOWN} | {"edition": settings["edition"] or ""}
    return {**row, "mixed": mixed}


def _check_one_network(group: Sequence[Result]) -> None:
    """One seed once, and the same network under every seed, or a :class:`UserError` naming both files."""
    first = group[0]
    seen: dict[int, Result] = {}
    for result in group:
        if result["seed"] in seen:
            raise UserError(
                f"seed {result['seed']} of {result['model']} appears twice: in {_file(seen[result['seed']])} and in "
                f"{_file(result)}; delete one of them, or train with another --seed"
            )
        seen[result["seed"]] = result
        for name in ("params", "macs"):
            if result[name] != first[name]:
                raise UserError(
                    f"{result['model']} is not one network: {name} is {first[name]} in {_file(first)} but "
                    f"{result[name]} in {_file(result)}; give one of them another model name, or retrain it"
                )


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor n - 1), NaN for a single value."""
    return float(statistics.mean(values)), statistics.stdev(values) if len(values) > 1 else math.nan


def _latency(group: Sequence[Result]) -> tuple[float, str]:
    """Median of the medians in ms and what they were measured on; NaN where that is nothing, or not one thing."""
    measured = [result for result in group if result.get("latency_ms")]
    places = {_latency_on(result) for result in measured}
    if not places:
        return math.nan, ""
    if len(places) > 1:
        return math.nan, " and ".join(sorted(places))
    return statistics.median(result["latency_ms"]["median"] for result in measured), places.pop()


def _latency_on(result: Result) -> str:
    latency, environment = result["latency_ms"], result.get("environment") or {}
    parts = [latency["device"], f"batch {latency['batch']}"]
    # Two processors are two clocks, and so are one and four threads; a CUDA time hardly depends on the host's.
    if latency["device"] == "cpu":
        threads = latency.get("threads") or environment.get("threads")
        parts += [environment.get("processor"), threads and f"{threads} thread{'s' * (threads != 1)}"]
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------- Pareto fronts
def comparable_rows(table: pd.DataFrame, cost: str) -> np.ndarray:
    """Boolean mask of the rows whose ``cost`` and quality may be held against each other.

    Rows marked ``mixed`` are out; for latency, so are those not measured where most of the rows were.
    """
    mask = np.ones(len(table), dtype=bool)
    if "mixed" in table:
        mask &= (table["mixed"] == "").to_numpy()
    if cost == "latency_ms" and "latency_on" in table:
        places = Counter(table["latency_on"][mask & table["latency_ms"].notna().to_numpy()])
        if places:
            mask &= (table["latency_on"] == max(places, key=lambda place: places[place])).to_numpy()
    return mask


def pareto_front(table: pd.DataFrame, cost: str = "macs", quality: str = "mAP_mean") -> np.ndarray:
    """Boolean mask of the rows that no other row beats: nothing is at least as cheap and as good, and better in one.

    Exact on ties: of two rows alike in both both stay; of two alike in one the other decides. A row with NaN in
    either, or not comparable (:func:`comparable_rows`), is never on the front and beats nobody.
    """
    if cost not in COSTS:
        raise unknown("cost", cost, COSTS)
    costs, qualities = table[cost].to_numpy(float), table[quality].to_numpy(float)
    valid = comparable_rows(table, cost) & np.isfinite(costs) & np.isfinite(qualities)
    # beats[i, j]: row i beats row j
    no_worse = (costs[:, None] <= costs) & (qualities[:, None] >= qualities)
    better = (costs[:, None] < costs) | (qualities[:, None] > qualities)
    beats = no_worse & better & valid[:, None]
    return valid & ~beats.any(axis=0)


def pareto_fronts(table: pd.DataFrame, quality: str = "mAP_mean") -> dict[str, np.ndarray]:
    """The front of each cost in ``COSTS``, as boolean masks."""
    return {cost: pareto_front(table, cost, quality) for cost in COSTS}


# ---------------------------------------------------------------------------------------- paired by seed
def paired(results: Sequence[Result], a: str, b: str) -> dict[str, float | int]:
    """mAP of ``a`` minus mAP of ``b`` over the seeds both have: ``{"mean", "std", "n"}``, fractions.

    ``a`` and ``b`` are model names or genotype keys. Nets trained under one seed saw the same batches, so their scores
    rise and fall together: the differences spread less than the scores, and tell more. ``std`` is the sample standard
    deviation of the differences, NaN with one seed.

    Raises :class:`UserError` for an unknown or ambiguous name, results that are not comparable, or no common seed.
    """
    ours, theirs = _of(results, a), _of(results, b)
    check_comparable([*ours, *theirs])
    _check_one_network(ours)
    _check_one_network(theirs)
    scores_a = {result["seed"]: result["mAP"] for result in ours}
    scores_b = {result["seed"]: result["mAP"] for result in theirs}
    common = sorted(scores_a.keys() & scores_b.keys())
    if not common:
        raise UserError(
            f"no common seed: {a} has {_listed(scores_a)}, {b} has {_listed(scores_b)}; "
            f"train one of them with a --seed of the other"
        )
    mean, std = _mean_and_std([scores_a[seed] - scores_b[seed] for seed in common])
    return {"mean": mean, "std": std, "n": len(common)}


def _of(results: Sequence[Result], name: str) -> list[Result]:
    """The results of one row, by model name or genotype key."""
    found = [result for result in results if name in (result["model"], result["genotype"])]
    if not found:
        raise unknown("model", name, {result["model"] for result in results})
    keys = {(result["model"], result["genotype"]) for result in found}
    if len(keys) > 1:
        rows = ", ".join(sorted(f"{model} with genotype {genotype}" for model, genotype in keys))
        raise UserError(f"'{name}' names several rows: {rows}; give a name that only one of them has")
    return found


def _listed(seeds: Iterable[int]) -> str:
    return "seeds " + ", ".join(map(str, sorted(seeds)))


# ---------------------------------------------------------------------------------------- words
def count(value: float) -> str:
    """A count in k, M or G, three significant digits.

    >>> count(11_561_775), count(983), count(1_776_934_400), count(1_404)
    ('11.6 M', '983', '1.78 G', '1.4 k')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # 999,600 is 1 M, not 1e+03 k
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def percent(mean: float, std: float = math.nan) -> str:
    """A fraction on screen: "49.3 ± 3.7", or "49.3" where there is no deviation, or "-".

    >>> percent(0.4931, 0.0368), percent(0.4931), percent(math.nan)
    ('49.3 ± 3.7', '49.3', '-')
    """
    if math.isnan(mean):
        return "-"
    return f"{100 * mean:.1f}" if math.isnan(std) else f"{100 * mean:.1f} ± {100 * std:.1f}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as a person reads it, all text: percent, k / M / G, best mAP first, fronts by letter.

    The column ``front`` holds P, M, L where the row is on the front of parameters, MACs, latency; ``model`` ends in
    "*" where the row is not comparable with the others.
    """
    fronts = pareto_fronts(table)
    letters = ["".join(LETTERS[cost] for cost in COSTS if fronts[cost][i]) for i in range(len(table))]
    columns: dict[str, list[str]] = {
        "front": letters,
        "model": [row["model"] + ("*" if row["mixed"] else "") for _, row in table.iterrows()],
    }
    if table["model"].duplicated().any():  # tells rows of one model apart
        columns["genotype"] = ["-" if pd.isna(key) else str(key) for key in table["genotype"]]
    columns["seeds"] = [str(seeds) for seeds in table["seeds"]]
    for name in ("params", "macs"):
        columns[{"params": "params", "macs": "MACs"}[name]] = [count(value) for value in table[name]]
    for name in [column.removesuffix("_mean") for column in table if column.endswith("_mean")]:
        pairs = zip(table[f"{name}_mean"], table[f"{name}_std"], strict=True)
        columns[f"{name} %".replace("rank", "rank-")] = [percent(mean, std) for mean, std in pairs]
    if table["latency_ms"].notna().any():
        columns["ms"] = ["-" if math.isnan(value) else f"{value:.3g}" for value in table["latency_ms"]]
    if table["embedding_bytes"].notna().any():
        columns["bytes"] = ["-" if math.isnan(value) else f"{value:.0f}" for value in table["embedding_bytes"]]
    if "file_bytes" in table:
        columns["file MB"] = ["-" if math.isnan(value) else f"{value / 1e6:.3g}" for value in table["file_bytes"]]
    if table["train_seconds"].notna().any():
        columns["train s"] = ["-" if math.isnan(value) else f"{value:.0f}" for value in table["train_seconds"]]
    order = table.sort_values(["mAP_mean", "model"], ascending=[False, True]).index
    return pd.DataFrame(columns, index=table.index).loc[order].reset_index(drop=True)


def notes(table: pd.DataFrame) -> list[str]:
    """What a reader of the table must know, a sentence each: conditions, units, fronts, marks."""
    plain = table[table["mixed"] == ""]
    shown = plain.iloc[0] if len(plain) else table.iloc[0]
    conditions = ", ".join(f"{name} {shown[name]}" for name in ("protocol", "input", "init", "recipe"))
    how = ", ".join(
        f"{name} {_constants(shown[name])}" for name in ("views", "rerank", "expand", "frames", "denominator")
        if shown[name] not in ("mean", "scored")  # these two go without saying
    )
    edition = f" ({shown['edition']})" if shown["edition"] else ""
    said = [
        f"{shown['dataset']}{edition}: {conditions}, {how}.",
        "Scores: mean ± sample standard deviation over seeds, in percent. MACs: multiply-accumulates of one image.",
        "Front (P by parameters, M by MACs, L by latency): no other row is as cheap and as good, and better in one.",
    ]
    places = Counter(table["latency_on"][table["latency_ms"].notna()])
    for place, _ in places.most_common():
        models = ", ".join(table["model"][table["latency_on"] == place])
        said.append(f"Milliseconds per batch on {place}" + (f": {models}." if len(places) > 1 else "."))
    if len(places) > 1:
        said.append("Latencies from different places are not comparable; the front is that of the commonest.")
    for _, row in table[table["mixed"] != ""].iterrows():
        said.append(f"* {row['model']} is not comparable: {row['mixed']}; it takes no part in the fronts.")
    return said


def _constants(value: Any) -> str:
    """A setting on screen; of several parts (held as JSON) all, and "off" where it is none.

    >>> _constants('{"k1": 20, "k2": 6, "lambda": 0.3}'), _constants(False), _constants(10), _constants("mean")
    ('k1=20 k2=6 lambda=0.3', 'off', '10', 'mean')
    """
    if isinstance(value, str) and value.startswith("{"):
        return " ".join(f"{name}={part}" for name, part in json.loads(value).items())
    return {"True": "on", "False": "off"}.get(str(value), str(value))


def format_table(table: pd.DataFrame) -> str:
    """The table for a terminal: fixed width, best mAP first, the notes below it; no newline at the end."""
    shown = readable(table)
    words = ("front", "model", "genotype")
    lines = []
    for cells in [list(shown.columns), *shown.to_numpy().tolist()]:
        parts = []
        for name, cell in zip(shown.columns, cells, strict=True):
            width = max(len(name), *map(len, shown[name]))
            parts.append(cell.ljust(width) if name in words else cell.rjust(width))
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *notes(table)])


def to_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table as it is (fractions, full precision) with a column ``front_<cost>`` per cost, whole or not."""
    fronts = {f"front_{cost}": mask for cost, mask in pareto_fronts(table).items()}
    write_text(path, table.assign(**fronts).to_csv(index=False, lineterminator="\n"))

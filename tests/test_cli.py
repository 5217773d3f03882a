"""The command line as users meet it: help, the exact words of mistakes, interruption and resuming, the next step."""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import planted
import pytest
import torch
import torchvision

from autoreid.cli import COMMANDS, build_parser, main
from autoreid.space import SearchSpace

SEARCH = [
    "--set", "channels=4", "--set", "layers=1,1", "--set", "stem=half", "--set", "identities=4", "--set", "images=3",
    "--set", "alpha_warmup=1", "--input", "32x16", "--set", "pad=2",
]  # fmt: skip
RECIPE = ["--input", "32x16", "--set", "identities=4", "--set", "images=3", "--set", "pad=2", "--set", "warmup_epochs=1"]


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=10, test_identities=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, so that no test draws into the user's."""
    monkeypatch.setenv("AUTOREID_CACHE", str(tmp_path / "cache"))


def words(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with a user's mistake."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and "Traceback" not in err
    return lines[-1]


# ---------------------------------------------------------------------------------------- help
def test_help_is_fast_and_needs_no_torch():
    seconds = []
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "autoreid", *arguments], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
        assert ("example: autoreid" in done.stdout) or arguments == ["--help"]
    assert statistics.median(seconds) < 0.5
    code = "import sys\nfrom autoreid.cli import build_parser\nbuild_parser()\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_names_in_the_help_texts_are_the_tables(capsys):
    """The help must not import torch, so it spells the names out; here they are held to the tables."""
    from autoreid.data import DATASETS
    from autoreid.evaluate import POOLINGS
    from autoreid.metrics import DENOMINATORS, METRICS, PROTOCOLS
    from autoreid.recipe import RECIPES
    from autoreid.search import ARCH_LOSSES, METHODS, PRESETS
    from autoreid.space import known_spaces

    text = ""
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    protocols = [name.replace("vehicleid/test-", "-") for name in PROTOCOLS]
    tables = (METHODS, PRESETS, RECIPES, known_spaces(), protocols, METRICS, ARCH_LOSSES, POOLINGS, DENOMINATORS)
    for name in (name for table in tables for name in table):
        assert name in text, name
    spelled = {f"drawn-{kind}{size}" for kind in ("people", "vehicles") for size in ("", "-tiny", "-market")}
    real = {name for name in DATASETS if not name.startswith("drawn-")}
    assert set(DATASETS) == real | spelled
    assert all(f"{name}," in text or f"{name}[" in text for name in real)


# ---------------------------------------------------------------------------------------- mistakes, word by word
def test_unknown_names(capsys, tmp_path, cache):
    assert words(capsys, "serch") == (
        "autoreid: unknown command 'serch'; did you mean 'search'? known: compare, cost, data, demo, density, evaluate, "
        "retrain, score, search, tune"
    )
    assert words(capsys, "search", "--dataset", "markt").startswith(
        "autoreid: unknown dataset 'markt'; did you mean 'market'?")
    assert words(capsys, "retrain", "resnet81", "--dataset", "market").startswith(
        "autoreid: unknown model 'resnet81'; did you mean 'resnet18'?")
    assert words(capsys, "search", "--dataset", "market", "--space", "ried").startswith(
        "autoreid: unknown search space 'ried'; did you mean 'reid'?")
    assert words(capsys, "search", "--dataset", "market", "--method", "gads") == (
        "autoreid: unknown method 'gads'; did you mean 'gdas'? known: darts, darts-2, gdas")
    assert words(capsys, "search", "--dataset", "market", "--presets", "x").startswith(
        "autoreid: unknown option of autoreid search '--presets'; did you mean '--preset'?")
    assert words(capsys, "retrain", "resnet18", "--dataset", "market", "--set", "lrr=1").startswith(
        "autoreid: unknown option of resnet18 'lrr'; known: dropout,")
    assert words(capsys, "evaluate", "w.safetensors", "--dataset", "market", "--protocol", "makret").startswith(
        "autoreid: unknown protocol 'makret'; did you mean 'market1501'?")


def test_bad_values(capsys, tmp_path):
    search = ("search", "--dataset", "market")
    assert words(capsys, *search, "--epochs", "0") == "autoreid: epochs=0: allowed is 1 or more"
    assert words(capsys, *search, "--input", "64") == (
        "autoreid search: argument --input: '64' is no picture size: give HEIGHTxWIDTH, as in 256x128; see autoreid "
        "search --help")
    assert words(capsys, *search, "--set", "lr") == "autoreid: --set lr: give key=value, as in --set epochs=60"
    assert words(capsys, *search, "--arch-loss", "ce").startswith("autoreid: arch_loss=ce with split=identity:")
    assert words(capsys, *search, "--device", "tpu") == "autoreid: --device tpu: allowed are auto, cpu, cuda and cuda:N"
    if not torch.cuda.is_available():
        assert words(capsys, *search, "--device", "cuda") == (
            "autoreid: --device cuda: PyTorch sees no CUDA device here; use --device cpu")
    assert words(capsys, "tune", "--dataset", "market").startswith(
        "autoreid tune is not here yet: it comes with the issue 'One shared recipe, tuned by Optuna'")


def test_a_space_with_one_operation(capsys, tmp_path, market):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"name": "one", "operations": ["none", "sep_conv_3x3"]}))
    assert words(capsys, "search", "--dataset", "market", "--root", str(market), "--space", str(path)) == (
        f"autoreid: {path}: search space one: only ['sep_conv_3x3'] besides none; nothing to search: list at least two "
        "operations")


def test_bad_genotypes(capsys, tmp_path, market):
    good = SearchSpace.load("reid").random(0).to_dict()
    path = tmp_path / "genotype.json"
    retrain = ("retrain", str(path), "--dataset", "market", "--root", str(market))
    assert words(capsys, *retrain) == f"autoreid: {path}: no such genotype file"
    for change, fault in (
        ({"normal": [[["identity", 1], ["identity", 1]], *good["normal"][1:]]},
         "genotype: normal node 2 reads input 1 twice; its two inputs must be distinct"),
        ({"reduction": good["reduction"][:3]},
         "genotype: normal has 4 nodes and reduction 3: both cells must have the same number"),
        ({"normal": [[["conv_9x9", 0], ["identity", 1]], *good["normal"][1:]]},
         "unknown operation in normal node 2 'conv_9x9';"),
    ):
        path.write_text(json.dumps({**good, **change}))
        assert words(capsys, *retrain).startswith(f"autoreid: {path}: {fault}")


WHERE = "the folder that holds Market-1501-v15.09.15, or that folder itself"
LOOKED = (
    "looked there and in its market1501/Market-1501-v15.09.15, Market-1501-v15.09.15, market1501, Market-1501, "
    "Market1501, market-1501, market for the folders bounding_box_train, query, bounding_box_test; give --root " + WHERE
)


def test_bad_dataset_folders(capsys, tmp_path, market):
    assert words(capsys, "search", "--dataset", "market") == (
        f"autoreid: dataset 'market' needs --root DIR: {WHERE}; to try without files use --dataset drawn-people")
    nowhere, empty, half = (tmp_path / name for name in ("nowhere", "empty", "half"))
    assert words(capsys, "search", "--dataset", "market", "--root", str(nowhere)) == (
        f"autoreid: dataset 'market' is not under {nowhere} (no such folder): {LOOKED}")
    empty.mkdir()
    assert words(capsys, "search", "--dataset", "market", "--root", str(empty)) == (
        f"autoreid: dataset 'market' is not under {empty}: {LOOKED}")
    shutil.copytree(market, half)
    shutil.rmtree(half / "Market-1501-v15.09.15" / "query")
    fault = words(capsys, "retrain", "resnet18", "--dataset", "market", "--root", str(half), "--out", str(tmp_path / "r"),
                  "--epochs", "1", "--set", "width=4", *RECIPE[:-2])
    assert fault == (
        f"autoreid: dataset 'market' at {half / 'Market-1501-v15.09.15'} is incomplete: folder 'query' (query) is "
        "missing; copy the whole dataset again (bounding_box_train, query, bounding_box_test)")
    assert not (tmp_path / "r").exists(), "found before the training"


def test_a_truncated_picture_is_named(capsys, tmp_path, market):
    copy = tmp_path / "copy"
    shutil.copytree(market, copy)
    picture = sorted((copy / "Market-1501-v15.09.15" / "bounding_box_train").iterdir())[0]
    picture.write_bytes(picture.read_bytes()[:200])
    fault = words(capsys, "search", "--dataset", "market", "--root", str(copy), "--out", str(tmp_path / "s"),
                  "--epochs", "2", *SEARCH)
    assert fault == (
        f"autoreid: image {picture} is truncated or unreadable; copy it again or delete it, and run `autoreid data NAME "
        "--root DIR` to list all unreadable files")
    assert main(["data", "market", "--root", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert f"problem: unreadable or truncated image {picture}: copy this file again or delete it" in out
    assert err == "autoreid: 1 problem in market, listed above with what to do\n"


def test_a_mistake_leaves_no_run_behind(capsys, tmp_path, market):
    """The corrected command needs no second option."""
    search = ("search", "--dataset", "market", "--root", str(market), "--out", str(tmp_path), "--epochs", "2", *SEARCH)
    assert words(capsys, *search, "--set", "identities=9") == (
        "autoreid: a batch of 9 identities x 3 images needs 9 identities, but there are only 5; lower identities to at "
        "most 5")
    for mistake, fault in (
        ("channels=-4", "channels=-4: allowed is 2 or more"),
        ("layers=2", "layers=[2]: allowed is two stages or more, each with a cell: without a second stage there is no "
         "reduction cell"),
        ("stem=poool", "unknown stem 'poool'; did you mean 'pool'? known: conv, half, pool"),
    ):
        assert words(capsys, *search, "--set", mistake) == f"autoreid: {fault}"
    assert list(tmp_path.iterdir()) == []
    assert words(capsys, "retrain", "resnet18", "--dataset", "market", "--root", str(market), "--out", str(tmp_path),
                 "--set", "embedding_dim=-5") == "autoreid: embedding_dim is -5; allowed: 1 or more, or none"
    assert words(capsys, "retrain", "resnet18", "--dataset", "market", "--root", str(market), "--name", "a/b") == (
        "autoreid: name=a/b: allowed is letters, digits, '.', '_' and '-'")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none(capsys):
    for option in ("--seed", "--workers"):
        for value in ("-1", "99999999999999999999"):
            assert words(capsys, "search", "--dataset", "market", f"{option}={value}") == (
                f"autoreid search: argument {option}: '{value}' is no whole number from 0 to 2147483647; see autoreid "
                "search --help")
    assert words(capsys, "--nope") == "autoreid: unknown option '--nope'; known: --help, --version, -h"
    assert words(capsys, "search", "--dataset", "market", "--resume", "--overwrite") == (
        "autoreid: --resume and --overwrite contradict each other: give one of them")
    assert words(capsys, "evaluate", "w", "--dataset", "market", "--rerank", "20,6") == (
        "autoreid: --rerank 20,6: give K1,K2,LAMBDA as in 20,6,0.3")


def test_no_permission_to_write(capsys, tmp_path, market, monkeypatch):
    """As the system says it; a real folder without permission stops nobody who runs the tests as root."""
    import tempfile

    def refuse(*_, dir, **__):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    fault = words(capsys, "search", "--dataset", "market", "--root", str(market), "--out", str(tmp_path), "--epochs", "2",
                  *SEARCH)
    assert fault == (
        f"autoreid: the system refused to read or write ({tmp_path / 'market-reid-darts-s0'}): Permission denied; free "
        "some space, mend the permission or choose another folder with --out or --root; nothing already written is lost")


def test_no_place_to_write(capsys, tmp_path, market):
    (tmp_path / "file").write_text("")
    fault = words(capsys, "search", "--dataset", "market", "--root", str(market), "--out", str(tmp_path / "file" / "x"),
                  "--epochs", "2", *SEARCH)
    assert fault.startswith("autoreid: the system refused to read or write (") and fault.endswith(
        "): Not a directory; free some space, mend the permission or choose another folder with --out or --root; nothing "
        "already written is lost")


def test_a_disk_that_fills_up_keeps_what_was_written(capsys, tmp_path, market, monkeypatch):
    import errno

    import autoreid.runs

    whole, written = autoreid.runs.write_bytes, []

    def fills_up(path, content):
        if path.name == "checkpoint.pt" and len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.extend([path] if path.name == "checkpoint.pt" else [])
        whole(path, content)

    monkeypatch.setattr(autoreid.runs, "write_bytes", fills_up)
    argv = ["search", "--dataset", "market", "--root", str(market), "--out", str(tmp_path), "--epochs", "3", *SEARCH]
    assert "No space left on device; free some space" in words(capsys, *argv)
    monkeypatch.undo()
    assert main([*argv, "--resume"]) == 0
    assert "resumed after epoch 1 of 3" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- killed, interrupted, resumed
def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "autoreid", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            # a suite started in the background by a shell inherits an ignored Ctrl-C
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(process: subprocess.Popen, ready) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def flat(value, name=""):
    """Every tensor and number of a nested state, by path; wall-clock seconds and peak memory left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("seconds", "memory"):
                yield from flat(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{name}/{i}")
    else:
        yield name, value


def same_state(one, other) -> None:
    a = dict(flat(torch.load(one, weights_only=True)))
    b = dict(flat(torch.load(other, weights_only=True)))
    assert a.keys() == b.keys()
    for name in a:
        equal = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert equal, name


def epochs_done(checkpoint) -> int:
    return torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.exists() else 0


JOBS = {
    "search-darts": (["search", "--method", "darts", *SEARCH, "--epochs", "4"], "market-reid-darts-s0"),
    "search-gdas": (["search", "--method", "gdas", *SEARCH, "--epochs", "4"], "market-reid-gdas-s0"),
    "retrain": (["retrain", "resnet18", "--set", "width=8", "--set", "dropout=0.3", *RECIPE, "--epochs", "8"],
                "market/resnet18-dropout0.3-width8-s0"),
}


@pytest.mark.parametrize("job", ["search-gdas", "retrain", pytest.param("search-darts", marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_bit_for_bit_as_if_never_killed(market, tmp_path, job):
    argv, folder = JOBS[job]
    argv = [*argv, "--dataset", "market", "--root", str(market)]
    whole = start(*argv, "--out", str(tmp_path / "whole"))
    assert whole.wait(300) == 0, whole.communicate()
    checkpoint = tmp_path / "killed" / folder / "checkpoint.pt"
    killed = start(*argv, "--out", str(tmp_path / "killed"))
    wait_for(killed, lambda: epochs_done(checkpoint) >= 1)
    time.sleep(0.15)  # into the next epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert epochs_done(checkpoint) < epochs_done(tmp_path / "whole" / folder / "checkpoint.pt"), "killed too late to tell"
    resumed = start(*argv, "--out", str(tmp_path / "killed"), "--resume")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0 and "resumed after epoch" in err
    same_state(checkpoint, tmp_path / "whole" / folder / "checkpoint.pt")
    for name in ("curves.csv", "alphas.csv"):
        one, other = tmp_path / "killed" / folder / name, tmp_path / "whole" / folder / name
        if other.exists():
            drop = 2 if name == "curves.csv" and "search" in job else 1 if name == "curves.csv" else 0
            rows = [[line.split(",")[: -drop or None] for line in p.read_text().splitlines()] for p in (one, other)]
            assert rows[0] == rows[1]  # all but the seconds (and the memory)
    if job == "retrain":
        files = [tmp_path / d / f"{folder}.json" for d in ("killed", "whole")]
        one, other = (json.loads(f.read_text()) for f in files)
        assert one["mAP"] == other["mAP"] and one["cmc"] == other["cmc"]
        assert files[0].with_suffix(".safetensors").read_bytes() == files[1].with_suffix(".safetensors").read_bytes()


def test_interrupted_by_the_keyboard(market, tmp_path):
    argv = ["search", *SEARCH, "--epochs", "50", "--dataset", "market", "--root", str(market), "--out", str(tmp_path)]
    process = start(*argv)
    folder = tmp_path / "market-reid-darts-s0"
    wait_for(process, lambda: (folder / "checkpoint.pt").exists())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == (
        "interrupted; nothing written is lost, go on with: autoreid " + " ".join([*argv, "--resume"]))
    assert (folder / "genotype.json").exists() and "Traceback" not in err


def test_overwritten_interrupted_and_resumed_is_the_new_run_not_the_old(market, tmp_path, capsys, monkeypatch):
    """The result of the overwritten run must not pass for the new one's, whenever the new one was stopped."""
    import autoreid.train

    def stop(*_):
        raise KeyboardInterrupt

    retrain = ["retrain", "resnet18", "--set", "width=4", "--dataset", "market", "--root", str(market), "--out",
               str(tmp_path), *RECIPE, "--epochs"]
    assert main([*retrain, "2"]) == 0
    result = tmp_path / "market" / "resnet18-width4-s0.json"
    assert json.loads(result.read_text())["train"]["epochs"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(autoreid.train.Criterion, "forward", stop)
        assert main([*retrain, "3", "--overwrite"]) == 130
    assert not result.exists() and not result.with_suffix(".safetensors").exists()
    capsys.readouterr()
    assert main([*retrain, "3", "--resume"]) == 0
    assert json.loads(result.read_text())["train"]["epochs"] == 3
    capsys.readouterr()
    assert "was started with recipe.epochs=3, now recipe.epochs=4" in words(capsys, *retrain, "4", "--resume")


# ---------------------------------------------------------------------------------------- the whole job, by hand
def test_search_retrain_evaluate_compare(market, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "market", "--root", str(market)]
    assert main(["search", *data, "--method", "gdas", "--epochs", "2", *SEARCH, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.strip().splitlines()[-1] == f"next: autoreid retrain {found['genotype']} --dataset market --root {market}"
    folder = tmp_path / "searches" / "market-reid-gdas-s0"
    for name in ("genotype.png", "alphas.png", "curves.png", "environment.json", "config.json", "summary.json"):
        assert (folder / name).stat().st_size > 0
    provenance = json.loads((folder / "genotype.json").read_text())["provenance"]
    assert {"command", "dataset", "method", "seed", "commit", "macro"} <= set(provenance)

    for model in (found["genotype"], "random-reid", "resnet18"):
        for seed in ("0", "1"):
            match = [] if model == found["genotype"] else ["--match", found["genotype"]]
            assert main(["retrain", model, *data, "--epochs", "1", *RECIPE[:-2], "--seed", seed, *match]) == 0
    capsys.readouterr()
    assert main(["compare", "results/market", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and all(row["seeds"] == 2 for row in rows)
    for name in ("comparison.csv", "pareto.png", "report.html"):
        assert (tmp_path / "results" / "market" / name).stat().st_size > 0

    weights = "results/market/market-reid-gdas-s0-s1.safetensors"
    assert main(["evaluate", weights, *data, "--out", "again.json"]) == 0
    one, other = (json.loads((tmp_path / p).read_text()) for p in ("again.json", weights.replace("safetensors", "json")))
    assert one["mAP"] == other["mAP"] and one["params"] == other["params"]
    capsys.readouterr()
    fault = words(capsys, "evaluate", weights, *data, "--out", "again.json")
    assert fault == "autoreid: again.json is there already: add --overwrite to replace it, or give another --out"

    assert main(["retrain", "resnet18", *data, "--epochs", "2", *RECIPE, "--set", "width=4"]) == 0
    capsys.readouterr()
    assert words(capsys, "compare", "results/market").startswith("autoreid: results are not comparable: recipe is")
    assert main(["compare", "results/market", "--allow-mixed"]) == 0
    assert "*" in capsys.readouterr().out


def test_the_same_job_in_veris_layout(tmp_path, capsys, monkeypatch):
    planted.write_dataset(tmp_path, planted.texture, identities=10, test_identities=4, layout="veri")
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "veri", "--root", str(tmp_path)]
    assert main(["search", *data, "--space", "reid-vehicle", "--method", "gdas", "--epochs", "2", *SEARCH]) == 0
    genotype = "searches/veri-reid-vehicle-gdas-s0/genotype.json"
    assert json.loads((tmp_path / genotype).read_text())["axis"] == "width"
    assert main(["retrain", genotype, *data, "--epochs", "1", *RECIPE[:-2]]) == 0
    result = json.loads((tmp_path / "results" / "veri" / "veri-reid-vehicle-gdas-s0-s0.json").read_text())
    assert result["protocol"] == "veri" and result["queries"] == {"total": 8, "scored": 8}


def test_data_reports_counts(market, capsys):
    assert main(["data", "market", "--root", str(market), "--json"]) == 0  # a subset is no fault
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["train"]["images"] == 80 and report["splits"]["train"]["identities"] == 10


def test_cost_counts_named_models(capsys):
    assert main(["cost", "darts-v2", "resnet50", "--input", "384x128", "--no-latency", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["params"] for row in rows] == [9_016_367 - 2048 * 751 - 751 + 2048, 25_046_831 - 2048 * 751 - 751 + 2048]
    assert set(rows[0]) == {"model", "input", "params", "macs", "flops", "macs_all", "activation_bytes", "latency_ms"}
    assert all(row["flops"] == 2 * row["macs"] for row in rows)


def test_cost_of_all_models_leaves_out_what_the_size_does_not_fit_and_draws(capsys, tmp_path, monkeypatch):
    names = ["densenet201", "osnet-x0.25", "resnet18", "safr-fig5-all"]
    monkeypatch.setattr("autoreid.network.known_models", lambda: names)
    picture = tmp_path / "cost.png"
    assert main(["cost", "--input", "30x30", "--no-latency", "--json", "--picture", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert [row["model"] for row in json.loads(out)] == ["osnet-x0.25", "resnet18"]  # an ablation is counted when named
    assert "densenet201: left out: " in err and "32" in err and picture.read_bytes().startswith(b"\x89PNG")
    assert words(capsys, "cost", "densenet201", "--input", "30x30").startswith(
        "autoreid: densenet: the picture is 30 x 30; both sides must be 32 pixels or more")
    assert words(capsys, "cost", "resnet18", "--picture", "cost.pdf") == (
        "autoreid: --picture cost.pdf: give the name of a .png file")


@pytest.mark.parametrize(("model", "options", "dims", "recipe"), [
    ("dare-r50", ["width=4", "hidden=8", "embedding_dim=6"], 6, "dare"),
    ("ha-cnn", ["channels=8,8,8", "embedding_dim=6"], 12, "robust-reid-swag"),
    ("safr-small", ["width=8"], 64, "safr"),
])
def test_models_of_every_head_by_their_own_recipe(market, tmp_path, capsys, monkeypatch, model, options, dims, recipe):
    """Retrained, evaluated from the weights alone, and compared: the same figures each time."""
    monkeypatch.chdir(tmp_path)
    data, small = ["--dataset", "market", "--root", str(market)], ["--input", "32x16", "--set", "identities=4"]
    swag = ["--set", "swag_cycles=2", "--set", "swag_epochs=1"] if recipe == "robust-reid-swag" else []
    sets = [word for option in options for word in ("--set", option)]
    argv = ["retrain", model, *data, "--recipe", recipe, *small, *swag, *sets, "--epochs", "1", "--name", "n", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["embedding"]["dims"] == dims and result["views"] == (10 if recipe == "dare" else 1)
    again = ["evaluate", "results/market/n-s0.safetensors", *data, "--views", str(result["views"]), "--json"]
    assert main(again) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert (evaluated["mAP"], evaluated["params"]) == (result["mAP"], result["params"])
    assert main(["compare", "results/market", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["mAP_mean"] == pytest.approx(result["mAP"], abs=1e-9)


def test_density_of_fresh_and_of_trained_networks(market, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "market", "--root", str(market)]
    assert main(["retrain", "resnet18", *data, *RECIPE, "--epochs", "1", "--set", "width=4", "--name", "r"]) == 0
    capsys.readouterr()
    density = ["density", "results/market/r-s0.safetensors", *data, "--images", "8", "--json"]
    assert main([*density, "--picture", "d.png"]) == 0
    groups = json.loads(capsys.readouterr().out)["r-s0"]
    assert list(groups) == ["stem", *(f"stage{s}.{b}" for s in (1, 2, 3, 4) for b in (1, 2))]
    assert all(0 < value < 1 for value in groups.values()) and (tmp_path / "d.png").stat().st_size > 1000
    assert main(["density", "darts-v2", *data, "--images", "4", "--input", "32x32", "--set", "channels=2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["darts-v2-channels2"])[-1] == "stage4" and "fresh weights" in err
    assert words(capsys, "density", "resnet18", *data, "--images", "0") == "autoreid: --images 0: give at least 1"
    assert words(capsys, "density", "gone.safetensors", *data).startswith("autoreid: no weights at gone.safetensors")


def test_retrain_from_imagenet_weights_in_a_file(market, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet18().state_dict(), "r18.pth")
    retrain = ["retrain", "resnet18", "--dataset", "market", "--root", str(market), *RECIPE, "--epochs", "1", "--json"]
    assert main([*retrain, "--init", "r18.pth", "--views", "10"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["init"], result["init_file"], result["views"], result["flip"]) == ("file", "r18.pth", 10, True)
    assert result["init_sha256"] == hashlib.sha256((tmp_path / "r18.pth").read_bytes()).hexdigest()
    assert words(capsys, *retrain, "--init", "gone.pth", "--overwrite").startswith(
        "autoreid: --init gone.pth: no such file;")
    assert words(capsys, *retrain, "--views", "3", "--overwrite") == (
        "autoreid: views=3: allowed is 1 (the picture), 2 (its mirror image too) or 10 (five crops, mirrored)")
    assert json.loads((tmp_path / "results/market/resnet18-s0.json").read_text()) == result  # neither mistake touched it
    size = ["retrain", "vit-b16", "--dataset", "market", "--root", str(market), *RECIPE, "--input", "60x32"]
    assert words(capsys, *size).startswith("autoreid: vit: the picture is 60 x 32")
    assert not (tmp_path / "results/market/vit-b16-s0").exists()  # a size that does not fit leaves no run behind


def test_score_of_features_made_by_anything(tmp_path, capsys):
    gallery = {"features": np.eye(3, dtype=np.float32), "identities": np.array([1, 2, 3]), "cameras": np.array([2, 2, 2])}
    query = {**gallery, "cameras": np.array([1, 1, 1])}
    np.savez(tmp_path / "q.npz", **query)
    np.savez(tmp_path / "g.npz", **gallery)
    assert main(["score", str(tmp_path / "q.npz"), str(tmp_path / "g.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "mAP": 1.0, "mAP_trapezoid": 1.0, "mINP": 1.0, "cmc": {"1": 1.0, "5": 1.0, "10": 1.0, "20": 1.0}, "total": 3,
        "scored": 3, "protocol": "market1501", "denominator": "scored", "repeats": 1, "std": None, "unreadable": 0}
    assert "none.npz" in words(capsys, "score", str(tmp_path / "none.npz"), str(tmp_path / "g.npz"))


def test_score_draws_vehicleids_galleries_and_reranks(tmp_path, capsys):
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(1, 7), 4)
    features = (rng.normal(size=(7, 8))[identities] + 0.8 * rng.normal(size=(24, 8))).astype(np.float32)
    np.savez(tmp_path / "all.npz", features=features, identities=identities)
    both = [str(tmp_path / "all.npz")] * 2
    assert main(["score", *both, "--protocol", "vehicleid/test-800"]) == 0
    assert "mean of 10 draws" in capsys.readouterr().out
    assert main(["score", *both, "--protocol", "vehicleid/test-800", "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["repeats"] == 10 and 0 < drawn["std"]["mAP"] < 0.2 and drawn["total"] == drawn["scored"] == 18
    cameras = np.tile([1, 2], 12)
    for name, part in (("q", slice(0, None, 4)), ("g", slice(1, None, 2))):
        np.savez(tmp_path / f"{name}.npz", features=features[part], identities=identities[part], cameras=cameras[part])
    sides = [str(tmp_path / "q.npz"), str(tmp_path / "g.npz"), "--json"]
    figures = []
    for options in ([], ["--rerank", "4,2,0.3"]):
        assert main(["score", *sides, *options]) == 0
        figures.append(json.loads(capsys.readouterr().out)["mAP"])
    assert figures[0] != figures[1]
    assert words(capsys, "score", *both, "--protocol", "vehicleid/test-800", "--rerank").startswith(
        "autoreid: protocol 'vehicleid/test-800' draws its gallery anew")
    assert words(capsys, "score", *sides, "--denominator", "some").startswith("autoreid: unknown denominator 'some'")


def test_retrain_on_one_dataset_and_test_on_another_with_every_option(market, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    veri = planted.write_dataset(tmp_path / "v", planted.texture, layout="veri", identities=10, test_identities=2)
    shutil.copytree(market / "Market-1501-v15.09.15", veri / "Market-1501-v15.09.15")
    (veri / "Market-1501-v15.09.15" / "query" / "0900_c1s1_000001_01.jpg").write_bytes(b"no picture")
    argv = ["retrain", "resnet18", "--dataset", "veri", "--test", "market", "--root", str(veri), *RECIPE, "--epochs", "1",
            "--set", "width=4", "--cache", "cache", "--rerank", "5,2,0.3", "--expand", "3,0", "--denominator", "all",
            "--json"]
    assert "0900_c1s1_000001_01.jpg" in words(capsys, *argv)
    assert main([*argv, "--skip-unreadable", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    path = tmp_path / "results" / "market" / "resnet18-width4-from-veri-s0.json"
    assert json.loads(path.read_text()) == result
    assert (result["dataset"], result["trained_on"], result["protocol"]) == ("market", "veri", "market1501")
    assert result["rerank"] == {"k1": 5, "k2": 2, "lambda": 0.3} and result["expand"] == {"k": 3, "alpha": 0.0}
    assert (result["denominator"], result["unreadable"], result["train_unreadable"]) == ("all", 1, 0)
    assert list((tmp_path / "cache").iterdir())
    evaluate = ["evaluate", str(path.with_suffix(".safetensors")), "--dataset", "market", "--root", str(market)]
    assert main([*evaluate, "--ranked", "lists.png", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trained_on"] == "veri" and "ranked lists: lists.png" in err
    assert (tmp_path / "lists.png").read_bytes().startswith(b"\x89PNG")
    assert words(capsys, *evaluate, "--ranked", "lists.png", "--queries", "gone.jpg").startswith(
        "autoreid: --queries gone.jpg: no query's path ends so; the first query is ")

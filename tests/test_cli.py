"""The command line as users meet it: help, the exact words of mistakes, interruption and resuming, the next step."""

import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

import miniature
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
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "autoreid", *arguments], capture_output=True, text=True, check=True)
        after = os.times()  # of processor time: what else the machine does is not ours
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
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
        "autoreid: unknown command 'serch'; did you mean 'search'? known: anytime, compare, compress, cost, data, demo, "
        "density, evaluate, export, find, index, retrain, score, search, sweep, tune"
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
        "most 5, as in --set identities=5")
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

    whole, written = autoreid.runs.whole_file, []

    def fills_up(path):
        if path.name == "checkpoint.pt" and len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.extend([path] if path.name == "checkpoint.pt" else [])
        return whole(path)

    monkeypatch.setattr(autoreid.runs, "whole_file", fills_up)
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


def state_in(checkpoint):
    sealed = torch.load(checkpoint, weights_only=True)
    return torch.load(io.BytesIO(sealed["state"].numpy().tobytes()), weights_only=True)


def same_state(one, other) -> None:
    a, b = dict(flat(state_in(one))), dict(flat(state_in(other)))
    assert a.keys() == b.keys()
    for name in a:
        equal = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert equal, name


def epochs_done(checkpoint) -> int:
    return state_in(checkpoint)["epoch"] if checkpoint.exists() else 0


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
        "scored": 3, "protocol": "market1501", "denominator": "scored", "repeats": 1, "std": None, "unreadable": 0,
        "metric": "euclidean", "rerank": None}
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


# ---------------------------------------------------------------------------------------- one evaluation, told in full
TINY = [*RECIPE, "--epochs", "1", "--set", "width=4"]


@pytest.fixture(scope="module")
def trained(market, tmp_path_factory):
    """Weights of the tiny network, with the result beside them."""
    out = tmp_path_factory.mktemp("trained")
    assert main(["retrain", "resnet18", "--dataset", "market", "--root", str(market), "--out", str(out), *TINY]) == 0
    return out / "market" / "resnet18-width4-s0.safetensors"


def own_list(folder, rows, extra=()):
    """A dataset csv of (identity, camera, split), a picture each, and further lines as they are."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), ["path,identity,camera,split"]
    for n, (identity, camera, split) in enumerate(rows):
        planted.Image.fromarray(planted.texture(rng, sum(identity.encode()))).save(folder / f"{n:02d}.png")
        lines.append(f"{n:02d}.png,{identity},{camera},{split}")
    (folder / "list.csv").write_text("\n".join([*lines, *extra]) + "\n")
    return str(folder / "list.csv")


def own_rows(cameras=(1, 2), tested=("emil", "fritz")):
    train = [(name, camera, "train") for name in ("anna", "bert", "carl", "dora") for camera in (1, 2, 1)]
    return train + [(name, camera, split) for name in tested for camera, split in zip(cameras, ("query", "gallery"))]


def test_what_names_tell_is_found_before_the_training(capsys, tmp_path, trained):
    """In the words of the evaluation, with a cure that retrain has too."""
    root = own_list(tmp_path / "one", own_rows(cameras=(1, 1)))
    data = ["--dataset", "csv", "--root", root]
    retrain = ["retrain", "resnet18", *data, "--out", str(tmp_path / "r"), *TINY]
    fault = words(capsys, *retrain)
    assert fault.startswith("autoreid: every gallery image") and "has camera 1" in fault and "--protocol plain" in fault
    assert words(capsys, "evaluate", str(trained), *data) == fault
    assert words(capsys, *retrain, "--protocol", "plane").startswith(
        "autoreid: unknown protocol 'plane'; did you mean 'plain'?")
    assert not (tmp_path / "r").exists()
    assert main([*retrain, "--protocol", "plain", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["protocol"], result["queries"]) == ("plain", {"total": 2, "scored": 2})

    vehicles = miniature.vehicleid(tmp_path)
    miniature.text(vehicles / "train_test_split" / "test_list_800.txt", ["0000201 3", "0000301 9"])
    fault = words(capsys, "retrain", "resnet18", "--dataset", "vehicleid/test-800", "--root", str(vehicles), "--out",
                  str(tmp_path / "v"), *TINY)
    assert "none of the 2 queries has a second image of its identity" in fault and not (tmp_path / "v").exists()


def test_an_unreadable_test_image_costs_no_training(capsys, tmp_path, market):
    copy = tmp_path / "copy of market"
    shutil.copytree(market, copy)
    bad = sorted((copy / "Market-1501-v15.09.15" / "query").iterdir())[0]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    retrain = ["retrain", "resnet18", "--dataset", "market", "--root", str(copy), "--out", str(tmp_path / "r"), *TINY]
    fault = words(capsys, *retrain)
    path = tmp_path / "r" / "market" / "resnet18-width4-s0.json"
    assert str(bad) in fault and "the training is done and its weights are saved" in fault and not path.exists()
    command = shlex.split(fault.split("`")[-2])
    assert main([*command[1:], "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert f"left out, as it cannot be read: {bad}" in err and (result["unreadable"], result["queries"]["total"]) == (1, 8)
    assert result["queries"]["scored"] == 7 and result["train"] == {"epochs": 1}
    bad.write_bytes(whole)
    assert main([*retrain, "--resume"]) == 0
    assert json.loads(path.read_text())["queries"] == {"total": 8, "scored": 8}


def test_leaks_are_said_and_recorded(capsys, tmp_path, trained):
    leaking = own_list(tmp_path / "leaks", own_rows(tested=("anna", "fritz")),
                       ["00.png,anna,1,gallery", "15.png,fritz,2,gallery"])
    out = tmp_path / "r"
    assert main(["retrain", "resnet18", "--dataset", "csv", "--root", leaking, "--out", str(out), *TINY, "--json"]) == 0
    printed, err = capsys.readouterr()
    warnings = json.loads(printed)["warnings"]
    for start, said in zip(("1 identity is in train and in the test, the first is anna", "1 file is in two parts",
                            "1 file is listed twice"), warnings, strict=True):
        assert said.startswith(start) and f"warning: {said}\n" in err
    weights = str(out / "csv" / "resnet18-width4-s0.safetensors")
    evaluate = ["evaluate", weights, "--dataset", "csv", "--json", "--root"]
    assert main([*evaluate, leaking]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed)["warnings"] == warnings and err.count("warning: ") == 3
    sound = own_list(tmp_path / "sound", own_rows())
    assert main([*evaluate, sound]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []
    half = own_list(tmp_path / "half", [*own_rows(), ("fritz", 1, "query")])
    assert main([*evaluate, half]) == 0
    capsys.readouterr()
    only = own_list(tmp_path / "only", [*own_rows(), ("emil", 2, "query")])  # a query whose camera took all answers
    assert main([*evaluate, only]) == 0
    printed, err = capsys.readouterr()
    assert len(json.loads(printed)["warnings"]) == 1 and "warning: every gallery image" in err


def test_a_file_that_is_trained_on_and_tested_elsewhere_is_a_leak_a_number_is_none(capsys, tmp_path):
    one = own_list(tmp_path / "one", own_rows())
    folder = tmp_path / "Market-1501-v15.09.15"
    for row, part in ((0, "bounding_box_train"), (1, "query"), (2, "bounding_box_test")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "one" / f"0{row}.png", folder / part / f"0001_c{row}s1_000001_00.png")
    argv = ["retrain", "resnet18", "--dataset", "csv", "--root", one, "--test", "market", "--test-root", str(tmp_path),
            "--out", str(tmp_path / "r"), *TINY, "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["warnings"], result["dataset"], result["trained_on"]) == ([], "market", "csv")
    with open(one, "a") as listed:
        listed.write(f"{folder / 'query' / '0001_c1s1_000001_00.png'},gina,1,train\n")
    assert main([*argv, "--overwrite"]) == 0
    [warning] = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("1 file is in two parts, the first is ") and "0001_c1s1" in warning
    assert words(capsys, *argv[:6], "--test-root", "x") == (
        "autoreid: --test-root x: it is where the dataset of --test lies; add --test NAME, or leave it out")
    assert "give --test-root the folder" in words(capsys, *argv[:8], "--test-root", str(tmp_path / "one"))


def test_two_sets_of_ones_own_are_not_pooled(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autoreid.cost.latency", lambda *_, **__: None)
    one, copy = (own_list(tmp_path / name, own_rows()) for name in ("one", "copy"))
    other = own_list(tmp_path / "other", own_rows(tested=("gina", "hans")))
    retrain = ["retrain", "resnet18", "--dataset", "csv", *TINY]
    for seed, root in enumerate((one, copy)):  # the same lists in another place
        assert main([*retrain, "--root", root, "--seed", str(seed)]) == 0
    assert main(["compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["seeds"] == 2
    assert main([*retrain, "--root", other, "--seed", "2"]) == 0
    capsys.readouterr()
    fault = words(capsys, "compare")
    assert fault.startswith("autoreid: results are not comparable: fingerprint is '") and "tested on other lists" in fault


def test_the_edition_of_msmt17_is_in_the_result(capsys, tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    for edition in ("V1", "V2"):
        root = miniature.msmt17(tmp_path / edition, edition)
        evaluate = ["evaluate", str(trained), "--dataset", "msmt17", "--root", str(root)]
        assert main([*evaluate, "--out", f"results/msmt17/{edition}.json"]) == 0
    one, other = (json.loads((tmp_path / f"results/msmt17/{edition}.json").read_text()) for edition in ("V1", "V2"))
    assert (one["edition"], other["edition"]) == ("MSMT17_V1", "MSMT17_V2")
    capsys.readouterr()
    assert "edition is 'MSMT17_V1' in" in words(capsys, "compare", "results/msmt17")


def test_an_evaluation_stands_beside_the_trainings_result(capsys, tmp_path, market, monkeypatch):
    """compare's advice: the result that lacks the views is evaluated again, onto its own file, and the rows agree."""
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "market", "--root", str(market)]
    retrain = ["retrain", "resnet18", *data, *TINY, "--name", "mine"]
    assert main([*retrain]) == 0 and main([*retrain, "--seed", "1", "--flip"]) == 0
    path = tmp_path / "results" / "market" / "mine-s0.json"
    before = json.loads(path.read_text())
    capsys.readouterr()
    fault = words(capsys, "compare")
    assert "views is 1 in" in fault and "`autoreid evaluate WEIGHTS ... --out RESULT.json --overwrite`" in fault
    weights = str(path.with_suffix(".safetensors"))
    assert main(["evaluate", weights, *data, "--flip", "--out", str(path), "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["compare", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["model"], row["seeds"], row["views"]) == ("mine", 2, 2) and row["train_seconds"] > 0
    after = json.loads(path.read_text())
    changed = {"mAP", "mAP_trapezoid", "mINP", "cmc", "flip", "views", "latency_ms", "environment"}
    assert after.keys() == before.keys() and all(after[key] == before[key] for key in before.keys() - changed)
    shutil.move(weights, tmp_path / "alone.safetensors")
    assert main(["evaluate", "alone.safetensors", *data, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {**alone, "train": before["train"], "environment": 0, "latency_ms": 0} == {**before, "environment": 0,
                                                                                      "latency_ms": 0}
    assert alone["train"] == {"epochs": 1}  # seconds and memory are not in the weights


@pytest.fixture
def no_pictures(monkeypatch):
    """Opening one is an error that is nobody's mistake."""
    monkeypatch.setattr("autoreid.evaluate.load_images", None)


@pytest.mark.parametrize(("options", "fault"), [
    (["--queries", "a.jpg"], "--queries a.jpg says whose lists are drawn: add --ranked FILE.png, or leave it out"),
    (["--ranked", "l.png", "--queries", "gone.jpg"], "--queries gone.jpg: no query's path ends so; the first query is "),
    (["--ranked", "l.png", "--queries", "0011_c1s1_000000_00.jpg,"], "--queries : no query's path ends so; the first"),
    (["--ranked", "l.png", "--queries", "000000_00.jpg"], "--queries 000000_00.jpg: no query's path ends so; the first"),
    (["--ranked", "l.pdf"], "--ranked l.pdf: give the name of a .png file"),
    (["--ranked", "there.png"], "there.png is there already: add --overwrite to replace it, or give another --ranked"),
    (["--ranked", "folder.png"], "--ranked folder.png is a folder: give the name of a file in it"),
    (["--ranked", "there.png/l.png"], "--ranked there.png/l.png: "),
    (["--ranked", "l.png", "--protocol", "cuhk03-classic"], "protocol 'cuhk03-classic' draws its gallery, so a"),
    (["--rerank", "0,6,0.3"], "k1 must be a whole number of neighbours, 1 or more, got 0"),
    (["--out", "folder.png"], "--out folder.png is a folder: give the name of a file in it"),
])
def test_an_evaluations_mistakes_are_found_before_it_begins(
    capsys, tmp_path, market, trained, monkeypatch, no_pictures, options, fault
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    out = [] if "--out" in options else ["--out", "o.json"]
    found = words(capsys, "evaluate", str(trained), "--dataset", "market", "--root", str(market), *out, *options)
    assert found.startswith(f"autoreid: {fault}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "there.png"]


def test_ranked_lists_cost_no_second_extraction_and_no_figures(capsys, tmp_path, market, trained, monkeypatch):
    import autoreid.evaluate
    import autoreid.plots

    monkeypatch.chdir(tmp_path)
    opened, load, drawn, draw = [], autoreid.evaluate.load_images, [], autoreid.plots.ranked_lists
    monkeypatch.setattr(autoreid.evaluate, "load_images", lambda some, size: (opened.extend(some), load(some, size))[1])
    monkeypatch.setattr(autoreid.plots, "ranked_lists", lambda *given: (drawn.append(given), draw(*given))[1])
    evaluate = ["evaluate", str(trained), "--dataset", "market", "--root", str(market), "--views", "10", "--json"]
    how = ["--rerank", "5,2,0.3", "--expand", "2,0"]
    assert main([*evaluate, *how, "--ranked", "l.png"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(opened) == 8 + 24 and (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    lists, query, gallery, title, name_of = drawn[0]
    assert len(lists) == len(query) == 8  # all of them, so their mean is the figure
    assert statistics.mean(found.average_precision for found in lists) == pytest.approx(result["mAP"])
    assert title.endswith("the worst queries (10 views, rerank, expand)") and name_of(11) == "11"
    ends = "query/0012_c2s1_000000_00.jpg,0011_c1s1_000000_00.jpg"
    assert main([*evaluate, "--ranked", "l.png", "--queries", ends, "--overwrite"]) == 0
    assert [query[found.query].identity for found in drawn[1][0]] == [12, 11]

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autoreid.plots, "save", refuse)
    capsys.readouterr()
    assert main([*evaluate, *how, "--ranked", "m.png", "--out", "o.json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["mAP"] == result["mAP"] == json.loads((tmp_path / "o.json").read_text())["mAP"]
    assert "No space left on device" in err


def test_what_cannot_be_read_is_named_and_not_drawn(capsys, tmp_path, market, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(market, tmp_path / "copy")
    folder = tmp_path / "copy" / "Market-1501-v15.09.15"
    bad = [sorted((folder / part).iterdir())[0] for part in ("query", "bounding_box_test")]
    for path in bad:
        path.write_bytes(b"no picture")
    evaluate = ["evaluate", str(trained), "--dataset", "market", "--root", "copy", "--skip-unreadable",
                "--denominator", "all"]
    chosen = ["--ranked", "l.png", "--queries", bad[0].name]
    assert main([*evaluate, *chosen[:2], "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["unreadable"], result["queries"]) == (2, {"total": 8, "scored": 7})
    assert [f"left out, as it cannot be read: {path}\n" in err for path in bad] == [True, True]
    assert main([*evaluate, *chosen, "--overwrite"]) == 2
    out, err = capsys.readouterr()
    assert "7 of 8 queries counted" in out and "2 unreadable images left out" in out
    assert "autoreid: --ranked: none of the chosen queries could be read, so there is no list to draw" in err


def test_many_queries_of_one_name_are_too_many_for_a_picture(capsys, tmp_path, trained, no_pictures):
    for n in range(51):
        for part in ("query", "gallery", "train"):
            path = tmp_path / "set" / part / f"{part[0] if part == 'train' else 'p'}{n:02d}" / f"{part}.png"
            path.parent.mkdir(parents=True)
            planted.Image.new("RGB", (8, 16)).save(path)
    fault = words(capsys, "evaluate", str(trained), "--dataset", "folder", "--root", str(tmp_path / "set"), "--ranked",
                  str(tmp_path / "l.png"), "--queries", "query.png")
    assert fault == ("autoreid: --queries query.png: 51 queries' paths end so, a picture has room for 50; give more of the "
                     "path, as in FOLDER/FILE")


def test_sets_that_keep_queries_in_the_gallery_can_be_evaluated_without_cameras(capsys, tmp_path, trained, monkeypatch):
    """What the advice of --rerank says: --protocol plain."""
    monkeypatch.chdir(tmp_path)
    veri, vehicles = miniature.veri(tmp_path / "v"), miniature.vehicleid(tmp_path / "i")
    for data, own in ((["--dataset", "veri", "--root", str(veri)], "veri"),
                      (["--dataset", "vehicleid", "--root", str(vehicles)], "vehicleid/test-800")):
        evaluate = ["evaluate", str(trained), *data, "--rerank", "2,1,0.3", "--ranked", "l.png", "--overwrite", "--json"]
        if own != "veri":
            assert words(capsys, *evaluate) == (
                f"autoreid: protocol '{own}' draws its gallery anew, and re-ranking or expansion would see all of it: "
                "leave --rerank and --expand out, or use --protocol plain, where the whole gallery answers")
        assert main([*evaluate, "--protocol", "plain"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["protocol"] == "plain" and "ranked lists: l.png" in err


def test_pictures_are_not_written_over(capsys, tmp_path, market, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(b"mine")
    monkeypatch.setattr("autoreid.cost.measure", None)  # found before any model is looked at
    for command in (["cost", "resnet18"], ["density", "resnet18", "--dataset", "market", "--root", str(market)]):
        assert words(capsys, *command, "--picture", "there.png") == (
            "autoreid: there.png is there already: add --overwrite to replace it, or give another --picture")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["cost", "resnet18", "--no-latency", "--picture", "there.png", "--overwrite"]) == 0
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")


def test_score_says_how_it_ranked_and_what_next(capsys, tmp_path):
    rng = np.random.default_rng(0)
    sides = [str(tmp_path / name) for name in ("q.npz", "g 1.npz")]
    arrays = {"features": rng.normal(size=(12, 4)), "identities": np.arange(12) % 4, "cameras": np.arange(12) // 4}
    for side, part in zip(sides, (slice(0, 4), slice(4, 12)), strict=True):
        np.savez(side, **{name: values[part] for name, values in arrays.items()})
    score = ["score", *sides, "--metric", "cosine"]
    assert main(score) == 0
    out, err = capsys.readouterr()
    assert "(market1501, cosine)" in out
    again = shlex.split(err.splitlines()[-1].removeprefix("next: "))
    assert again[-1] == "--rerank" and main([*again[1:], "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["metric"], result["rerank"]) == ("cosine", {"k1": 20, "k2": 6, "lambda": 0.3})
    assert err.splitlines()[-1] == "next: autoreid cost"
    assert main([*score, "--rerank", "3,2,0.5"]) == 0
    assert "(market1501, cosine, rerank 3,2,0.5)" in capsys.readouterr().out


def test_score_names_what_it_cannot_use(capsys, tmp_path):
    good = {"features": np.eye(40, dtype=np.float32), "identities": np.arange(40), "cameras": np.ones(40, int)}
    np.savez(tmp_path / "g.npz", **good)
    np.savez(tmp_path / "f.npz", **{**good, "identities": np.arange(40.0)})
    fault = words(capsys, "score", str(tmp_path / "f.npz"), str(tmp_path / "g.npz"))
    assert fault.startswith("autoreid: query identities must be") and fault.endswith(".astype('int64')")
    np.savez_compressed(tmp_path / "c.npz", **good)
    content = bytearray((tmp_path / "c.npz").read_bytes())
    content[60:100] = bytes(40)
    (tmp_path / "c.npz").write_bytes(content)
    assert words(capsys, "score", str(tmp_path / "c.npz"), str(tmp_path / "g.npz")).startswith(
        f"autoreid: {tmp_path / 'c.npz'} cannot be read as arrays of numbers; give an .npz with features")


def test_an_option_that_swallowed_the_file_is_named(capsys):
    assert words(capsys, "evaluate", "--rerank", "w.safetensors", "--dataset", "market") == (
        "autoreid evaluate: the following arguments are required: WEIGHTS; --rerank took 'w.safetensors' for its value: "
        "put --rerank last; see autoreid evaluate --help")
    assert words(capsys, "evaluate", "--dataset", "market", "--rerank").endswith(
        "required: WEIGHTS; see autoreid evaluate --help")
    fault = words(capsys, "evaluate", "w", "--dataset", "market", "--cache", "c")
    assert fault.startswith("autoreid: unknown option of autoreid evaluate '--cache'; known: ")


def test_data_proposes_a_search_that_runs(capsys, tmp_path, monkeypatch):
    """Half of the identities of a folder train, and a search halves these again."""
    monkeypatch.chdir(tmp_path)
    for identity in range(12):
        for n in range(4):
            path = tmp_path / "set" / f"p{identity:02d}" / f"{n}_c{n % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            planted.Image.fromarray(planted.texture(np.random.default_rng(n), identity)).save(path)
    assert main(["data", "folder", "--root", "set"]) == 0
    proposed = capsys.readouterr().err.splitlines()[-1]
    assert proposed == "next: autoreid search --dataset folder --root set --set identities=3"
    argv = [*shlex.split(proposed.removeprefix("next: "))[1:], "--epochs", "1", "--set", "alpha_warmup=0",
            "--input", "32x16", "--set", "channels=2", "--set", "layers=1,1", "--set", "stem=half"]
    assert main(argv) == 0
    capsys.readouterr()
    assert words(capsys, *argv, "--set", "identities=4", "--overwrite").endswith("as in --set identities=3")

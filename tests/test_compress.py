"""Which networks a question asks for, the chain of pruning, what is fitted without training, and the command."""

import hashlib
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import reference_compression as slow
import torch

import autoreid.train
from autoreid import compress, data, plots_compress
from autoreid.cli import build_parser, main
from autoreid.compression import bytes_of, ratio
from autoreid.errors import UserError
from autoreid.network import find_model, load_weights, save_weights
from autoreid.recipe import RECIPES, Recipe, step_of_pruning
from autoreid.runs import Preempted, Run
from autoreid.train import retrain

SMALL = Recipe(
    input=(32, 16), optimizer="sgd", lr=0.02, epochs=6, warmup_epochs=0, identities=4, images=3, pad=2, erase=0.2
)
MODEL = {"width": 4, "stem": 3}
NAME = "resnet18-stem3-width4"
OPTIONS = ["--recipe", "drawn", "--set", "width=4", "--set", "stem=3", "--input", "32x16", "--set", "identities=4",
           "--set", "images=2", "--set", "warmup_epochs=0", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=8, test_identities=5)


@pytest.fixture(scope="module")
def trained(market, tmp_path_factory):
    """One chain, once: the full embedding, one low rank, two steps of pruning, all in int8 too, and the fits."""
    out = tmp_path_factory.mktemp("results")
    folder = compress.train(find_model("resnet18", MODEL), "market", SMALL, out, sizes=[8, 4], root=str(market),
                            methods=["full", "low-rank", "prune", "pca", "pq", "int8", "cut"])
    return folder


# ---------------------------------------------------------------------------------------- what is asked
def test_more_axes_than_training_images_span_are_found_before_a_training(market, tmp_path, capsys):
    count = len(data.load("market", str(market), parts=("train",)).train)
    asked = ["compress", "resnet18", "--dataset", "market", "--root", str(market), "--methods", "pca", "--dims", "120",
             "--recipe", "drawn", "--set", "width=16", "--set", "stem=3", "--out", str(tmp_path)]
    assert count <= 120 and main(asked) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"autoreid: PCA to 120 dimensions: {count} training embeddings of 128 span at most {count - 1}; give fewer --dims, "
        "or leave pca out of --methods"]
    assert not list(tmp_path.iterdir())


def test_the_default_sizes_are_the_papers_in_proportion():
    assert compress.default_sizes(768) == [576, 480, 384, 192, 64, 32]
    assert compress.default_sizes(48) == [36, 30, 24, 12, 4, 2]
    assert compress.default_sizes(1024, parts=2) == [768, 640, 512, 256, 86, 42]
    assert compress.default_sizes(2) == [1]


def test_every_job_comes_after_the_one_that_it_begins_with():
    spec = find_model("resnet18", MODEL)
    jobs = compress.jobs_of(spec, ["full", "slice", "low-rank", "prune"], [4, 16, 8], "also")
    names = [job.name.removeprefix(NAME) for job in jobs]
    assert names[:10] == ["", "-slice16", "-slice8", "-slice4", "-lowrank16", "-lowrank8", "-lowrank4", "-prune16",
                          "-prune8", "-prune4"]
    assert names[10:] == ["-int8", *(f"{name}-int8" for name in names[1:10])]
    by_name = dict(zip(names, jobs, strict=True))
    for name, larger in (("-prune16", ""), ("-prune8", "-prune16"), ("-prune4-int8", "-prune8-int8"),
                         ("-prune16-int8", "-int8")):
        assert by_name[name].larger is by_name[larger]
    assert by_name["-slice8-int8"].spec.head == {"slice": 8, "int8": True} and by_name["-slice8"].spec.head == {"slice": 8}
    assert by_name["-lowrank4"].spec.head == {"rank": 4} and by_name["-prune4"].spec.head == {"keep": 4}
    assert by_name["-slice8"].larger is None and by_name[""].spec == spec


@pytest.mark.parametrize(("methods", "int8", "names"), [
    (["prune"], "no", ["", "-prune8"]), (["prune"], "only", ["-int8", "-prune8-int8"]), (["slice"], "no", ["-slice8"]),
    (["pca"], "also", [""]), (["pca"], "only", [""]), (["full"], "also", ["", "-int8"]),
    (["slice", "pq"], "only", ["", "-slice8-int8"]),
])
def test_only_what_is_asked_for_is_trained(methods, int8, names):
    jobs = compress.jobs_of(find_model("resnet18", MODEL), methods, [8], int8)
    assert [job.name.removeprefix(NAME) for job in jobs] == names


@pytest.mark.parametrize(("options", "methods", "sizes", "int8", "words"), [
    ({}, ["slicing"], [8], "also", "unknown method 'slicing'; did you mean 'slice'? known: "),
    ({}, ["slice"], [8], "yes", "unknown --int8 'yes'; known: also, no, only"),
    ({}, ["slice"], [32], "also", f"--dims 32: the full embedding of {NAME} has 32 dimensions; allowed: 1 to 31"),
    ({"slice": 8}, ["slice"], [4], "also", "slice: the command compresses the model itself; leave these options out"),
    ({}, [], [4], "also", "no method is given; known: "),
])
def test_mistakes_are_named(options, methods, sizes, int8, words):
    with pytest.raises(UserError) as fault:
        compress.jobs_of(find_model("resnet18", {**MODEL, **options}), methods, sizes, int8)
    assert str(fault.value).startswith(words)


def test_two_vectors_side_by_side_are_shortened_alike():
    spec = find_model("ha-cnn", {})
    with pytest.raises(UserError, match="--dims 33: the full embedding of ha-cnn has 1024 dimensions; allowed: 1 to 1023, "
                                        "multiples of 2"):
        compress.jobs_of(spec, ["slice"], [33], "no")
    assert [job.dims for job in compress.jobs_of(spec, ["slice"], [32], "no")] == [32]


@pytest.mark.parametrize(("epochs", "fifth"), [(240, 48), (12, 3), (60, 12), (1, 1)])
def test_a_step_of_pruning_has_a_fifth_of_the_epochs_rounded_up(epochs, fifth):
    recipe = replace(RECIPES["default"], epochs=epochs, warmup_epochs=epochs // 6, milestones=(epochs // 2,))
    step = step_of_pruning(recipe)
    assert step.epochs == fifth == math.ceil(epochs / 5) and step.lr == recipe.lr
    assert step.warmup_epochs == recipe.warmup_epochs * fifth // epochs
    assert step.milestones == (epochs // 2 * fifth // epochs,)


# ---------------------------------------------------------------------------------------- trainings
def results(folder: Path) -> dict[str, dict]:
    return {path.stem.removeprefix(NAME).removesuffix("-s0"): json.loads(path.read_text())
            for path in folder.glob(f"{NAME}*-s0.json")}


def test_results_say_what_is_stored(trained):
    found = results(trained)
    stored = {name: tuple(r["embedding"][key] for key in ("dims", "dtype", "bytes")) for name, r in found.items()}
    wanted = {f"-{method}{k}": (k, "float32", 4 * k) for method in ("lowrank", "prune", "pca", "cut") for k in (8, 4)}
    wanted |= {f"{name}-int8": (k, "int8", k) for name, (k, _, _) in wanted.items()}
    assert stored == wanted | {"": (32, "float32", 128), "-int8": (32, "int8", 32), "-after-int8": (32, "int8", 32),
                               "-pq8": (32, "pq", 8), "-pq4": (32, "pq", 4)}
    assert found["-pq8"]["embedding"]["shared_bytes"] == 4 * 64 * 32  # 64 training images, no 256 centroids
    assert all(0 < r["mAP"] <= 1 and r["environment"]["torch"] for r in found.values())
    assert found["-lowrank8"]["params"] - found[""]["params"] == 8 * 32 - 24


def test_the_chain_goes_on_with_a_fifth_of_the_epochs_and_says_from_where(trained):
    found = results(trained)
    before = {"-prune8": "", "-prune4": "-prune8", "-prune8-int8": "-int8", "-prune4-int8": "-prune8-int8"}
    for name, larger in before.items():
        file = trained / f"{NAME}{larger}-s0.safetensors"
        assert found[name]["init"] == "pruned" and found[name]["init_file"] == file.name
        assert found[name]["init_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert found[name]["train"]["epochs"] == 2
        assert found[name]["init_epochs"] == (6 if "4" not in name else 8)
    assert found[""]["init"] == "scratch" and "init_epochs" not in found[""]


def test_a_step_keeps_the_largest_columns_of_the_training_set(trained, market):
    """From the larger net's weights alone, and from the pruned one's buffer: the same columns of the full embedding."""
    samples = data.load("market", str(market), parts=("train",)).train
    kept = torch.arange(32)
    for name, smaller, k in (("", "-prune8", 8), ("-prune8", "-prune4", 4)):
        larger = load_weights(trained / f"{NAME}{name}-s0.safetensors")[0]
        features = autoreid.train.extract(autoreid.train._BeforeNecks(larger), samples, (32, 16))
        assert features.shape == (64, len(kept))
        kept = kept[slow.kept_columns(features.tolist(), k)]
        assert torch.equal(kept, load_weights(trained / f"{NAME}{smaller}-s0.safetensors")[0].head.reduce.kept)


def test_a_step_begins_with_the_larger_nets_weights_and_classifier(trained, market, tmp_path, monkeypatch):
    """At a learning rate of next to nothing, the step's net is the larger one's columns."""
    still = replace(step_of_pruning(SMALL), lr=1e-12, lr_min=0.0, weight_decay=0.0)
    learners = []
    learner = autoreid.train.Learner
    monkeypatch.setattr(autoreid.train, "Learner", lambda *a, **o: learners.append(learner(*a, **o)) or learners[-1])
    for name in ("", "-prune8"):
        larger = trained / f"{NAME}{name}-s0.safetensors"
        k = 4 if name else 8
        path, _ = retrain(find_model("resnet18", {**MODEL, "keep": k}), "market", still, tmp_path, root=str(market),
                          prune=larger)
        before, after = load_weights(larger)[0], load_weights(path.with_suffix(".safetensors"))[0]
        images = torch.randn(4, 3, 32, 16)
        z, kept = after.eval().before_necks(images)[0], after.head.reduce.kept
        place = [before.head.reduce.kept.tolist().index(c) if name else c for c in kept.tolist()]
        for x, y in zip(before.backbone.parameters(), after.backbone.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
        torch.testing.assert_close(before.head.neck.weight[place], after.head.neck.weight, rtol=0, atol=1e-6)
        assert z.shape == (4, k)
        state = Run.saved(larger.with_suffix(""))
        torch.testing.assert_close(learners[-1].criterion.classifiers[0].weight,
                                   state["criterion"]["classifiers.0.weight"][:, place], rtol=0, atol=1e-6)


def test_a_stopped_chain_goes_on_to_the_same_end_and_finished_jobs_are_left_alone(trained, market, tmp_path, monkeypatch):
    spec, options = find_model("resnet18", MODEL), {"sizes": [8, 4], "root": str(market), "int8": "only"}
    save, stops = Run.save, iter((("-int8", 3), ("-prune8-int8", 1), ("-prune4-int8", 1)))
    stop = next(stops)

    def stop_after(run, state):
        save(run, state)
        nonlocal stop
        if stop and run.folder.name == f"{NAME}{stop[0]}-s0" and state["epoch"] == stop[1]:
            stop = next(stops, None)
            raise Preempted

    monkeypatch.setattr(Run, "save", stop_after)
    for _ in range(3):
        with pytest.raises(Preempted):
            compress.train(spec, "market", SMALL, tmp_path, methods=["prune"], **options)
    folder = compress.train(spec, "market", SMALL, tmp_path, methods=["prune"], **options)
    for name in ("-int8", "-prune8-int8", "-prune4-int8"):
        file = f"{NAME}{name}-s0.safetensors"
        assert (folder / file).read_bytes() == (trained / file).read_bytes()
    monkeypatch.setattr(autoreid.train, "fit", lambda *a, **o: pytest.fail("trained again"))
    for path in folder.glob("*.safetensors"):  # a record is enough
        path.unlink()
    compress.train(spec, "market", SMALL, tmp_path, methods=["prune"], **options)
    with pytest.raises(UserError, match=r"-int8-s0 was started with lr=0.02, now lr=0.01: give the same options, --overw"):
        compress.train(spec, "market", replace(SMALL, lr=0.01), tmp_path, methods=["prune"], **options)


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(compress, "retrain", lambda *a, **o: pytest.fail("trained before all was checked"))


def test_an_overwritten_question_that_was_stopped_goes_on_without_the_option(market, tmp_path, monkeypatch):
    spec, new = find_model("resnet18", MODEL), replace(SMALL, epochs=1, lr=0.01)
    options = {"methods": ["full", "prune", "cut"], "sizes": [8], "root": str(market), "int8": "no"}
    folder = compress.train(spec, "market", replace(SMALL, epochs=1), tmp_path, **options)
    names = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Run, "save", lambda run, state: (_ for _ in ()).throw(Preempted))
        compress.train(spec, "market", new, tmp_path, **options, overwrite=True)
    assert not list(folder.glob("*.json")) and not list(folder.glob("*.safetensors"))
    compress.train(spec, "market", new, tmp_path, **options)  # the command that is printed
    assert {path.name for path in folder.iterdir()} == names
    assert len(compress.summary(folder, NAME, "market")["rows"]) == 3


def test_another_recipe_start_or_dataset_with_another_seed_is_found_before_a_training(trained, market, tmp_path, untrained):
    spec, options = find_model("resnet18", MODEL), {"methods": ["slice"], "sizes": [8], "int8": "no", "seed": 1}
    shutil.copytree(trained, tmp_path / "market" / trained.name)
    weights = trained / f"{NAME}-s0.safetensors"
    other = planted.write_dataset(tmp_path / "other", planted.texture, identities=7, test_identities=5)
    tuned = {"methods": ["full"], "init": str(weights)}
    for recipe, root, more, field in (
        (replace(SMALL, lr=0.01), market, {}, "recipe"), (SMALL, market, tuned, "init file and scratch"),
        (SMALL, other, {}, "fingerprint"), (replace(SMALL, lr=0.01), market, {"overwrite": True}, "recipe"),
    ):
        with pytest.raises(UserError, match=f"results of {field} .*would stand side by side; write elsewhere with --out"):
            compress.train(spec, "market", recipe, tmp_path, root=str(root), **{**options, **more})


def test_another_chain_in_the_same_folder_is_found_before_a_training(trained, market, tmp_path, untrained):
    spec, options = find_model("resnet18", MODEL), {"methods": ["prune"], "sizes": [4], "int8": "no", "root": str(market)}
    shutil.copytree(trained, tmp_path / "market" / trained.name)
    for seed in (0, 1):
        with pytest.raises(UserError, match=f"{NAME}-prune4-s0 was pruned from {NAME}-prune8 there, asked is from {NAME}: "
                                            ".*give the first run's --dims, or another --out"):
            compress.train(spec, "market", SMALL, tmp_path, seed=seed, **options)
    full = tmp_path / "market" / trained.name / f"{NAME}-s0.safetensors"
    shutil.copy(trained / f"{NAME}-int8-s0.safetensors", full)
    with pytest.raises(UserError, match=f"-prune8-s0 was pruned from other weights than {full.name} there: --overwrite"):
        compress.train(spec, "market", SMALL, tmp_path, **{**options, "sizes": [8]})


def test_own_weights_that_some_networks_cannot_begin_with_are_named_before_a_training(trained, market, tmp_path, untrained):
    spec, weights = find_model("resnet18", MODEL), trained / f"{NAME}-s0.safetensors"
    options = {"sizes": [8], "root": str(market), "init": str(weights)}
    with pytest.raises(UserError, match=f"--init .*: {NAME}-slice8, {NAME}-int8, {NAME}-slice8-int8 cannot begin with "
                                        "these weights, .*leave these out by --methods and --int8, or give the file"):
        compress.train(spec, "market", SMALL, tmp_path, methods=["full", "slice"], **options)
    with pytest.raises(UserError, match="which is another network"):
        compress.train(find_model("resnet18", {"width": 5}), "market", SMALL, tmp_path, methods=["slice"], **options)
    assert not list(tmp_path.iterdir())


def test_pruning_refuses_what_it_cannot_go_on_from(trained, market, tmp_path):
    def step(changes, weights=trained / f"{NAME}-prune8-s0.safetensors"):
        return retrain(find_model("resnet18", {**MODEL, **changes}), "market", SMALL, tmp_path, root=str(market),
                       prune=weights)

    for changes in ({"keep": 4, "int8": True}, {"slice": 4}, {"keep": 4, "width": 5}):
        with pytest.raises(UserError, match=f"are the weights of {NAME}-prune8; a step of pruning to .* begins with those"):
            step(changes)
    with pytest.raises(UserError, match=r"keep=8: allowed is 1 to 7: .* has embeddings of 8 dimensions"):
        step({"keep": 8})
    alone = tmp_path / "alone.safetensors"
    shutil.copy(trained / f"{NAME}-prune8-s0.safetensors", alone)
    with pytest.raises(UserError, match=r"alone holds no checkpoint, and pruning goes on with the classifiers in it"):
        step({"keep": 4}, alone)


def test_fine_tuning_begins_with_autoreids_own_weights(trained, market, tmp_path, monkeypatch):
    weights = trained / f"{NAME}-lowrank8-int8-s0.safetensors"
    still = replace(SMALL, epochs=1, lr=1e-12, lr_min=0.0, weight_decay=0.0)
    path, result = retrain(find_model("resnet18", {**MODEL, "rank": 8, "int8": True}), "market", still, tmp_path,
                           root=str(market), init=str(weights))
    assert result["init"] == "file" and result["init_file"] == weights.name
    assert result["init_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    before, after = (load_weights(p)[0] for p in (weights, path.with_suffix(".safetensors")))
    for x, y in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="which is another network"):
        retrain(find_model("resnet18", MODEL), "market", still, tmp_path, root=str(market), init=str(weights))
    assert not (tmp_path / "market" / f"{NAME}-s0").exists()


# ---------------------------------------------------------------------------------------- without training
def test_nothing_is_fitted_to_query_or_gallery():
    """A gallery image is stored as it would be in any other company."""
    train, query, gallery = torch.randn(300, 8), torch.randn(5, 8), torch.randn(20, 8)
    names = compress.names_of_fits(8, compress.FITTED, [2, 4], "also")
    both = [{fit.name: fit for fit in compress.fits_of(train, query * q, g, names)}
            for q, g in ((1, gallery), (9, torch.cat([gallery, 50 * torch.randn(7, 8)])))]
    assert list(both[0]) == ["after-int8", "pca4", "pca4-int8", "cut4", "cut4-int8", "pq4", "pca2", "pca2-int8", "cut2",
                             "cut2-int8", "pq2"]
    for name, fit in both[0].items():
        torch.testing.assert_close(fit.gallery, both[1][name].gallery[:20], rtol=1e-6, atol=1e-6)
        assert fit.embedding == both[1][name].embedding and len(fit.query) == 5
    scale = float(train.abs().max()) / 127
    codes = both[0]["after-int8"].gallery / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert torch.equal(both[0]["cut4"].query, query[:, :4]) and torch.equal(both[0]["pq4"].query, query)
    assert compress.names_of_fits(8, ["pca", "int8"], [2], "no") == ["pca2"]
    assert compress.names_of_fits(8, ["pca", "pq"], [2, 5], "only") == ["pca5-int8", "pca2-int8", "pq2"]
    [alone] = compress.fits_of(train, query, gallery, ["pca2"])  # whatever else is fitted
    torch.testing.assert_close(alone.gallery, both[0]["pca2"].gallery)


def test_fits_are_made_once_and_anew_of_other_weights(trained, market, tmp_path, capsys):
    weights = tmp_path / "a-s0.safetensors"
    shutil.copy(trained / f"{NAME}-s0.safetensors", weights)
    options = {"methods": ["pca", "cut"], "sizes": [4], "int8": "no", "root": str(market)}
    compress.fit_all(weights, "market", tmp_path, **options)
    files = {path.name for path in tmp_path.glob("*.json")}
    assert files == {f"{NAME}{m}-s0.json" for m in ("", "-pca4", "-cut4")}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    compress.fit_all(weights, "market", tmp_path, **options)
    assert "pca, cut of a-s0.safetensors: there already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    record = json.loads((tmp_path / f"{NAME}-pca4-s0.json").read_text())
    assert record["made_from"]["file"] == "a-s0.safetensors" and record["made_from"]["fitted_on"] == 64
    options["sizes"] = [2]
    compress.fit_all(weights, "market", tmp_path, **options)
    assert all((tmp_path / f"{NAME}-pca{k}-s0.json").exists() for k in (4, 2))
    (tmp_path / f"{NAME}-cut4-s0.json").unlink()
    capsys.readouterr()
    compress.fit_all(weights, "market", tmp_path, **{**options, "sizes": [4, 2]})  # what is missing, whoever asked before
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "mAP" in line] == ["cut4"]
    net, header = load_weights(weights)  # trained anew: what was made of the old one goes
    torch.nn.init.zeros_(net.head.neck.weight[:5])
    save_weights(weights, net, find_model("resnet18", MODEL), **{k: v for k, v in header.items()
                                                                 if k not in ("format", "version", "model")})
    with pytest.raises(UserError, match=r"-s0.json is of other weights than .*a-s0.safetensors, or of another dataset .*"
                                        "--overwrite replaces what is there, or write elsewhere with --out"):
        compress.fit_all(weights, "market", tmp_path, **options)
    assert (tmp_path / f"{NAME}-pca4-s0.json").exists()
    compress.fit_all(weights, "market", tmp_path, **options, overwrite=True)
    assert not (tmp_path / f"{NAME}-pca4-s0.json").exists() and (tmp_path / f"{NAME}-pca2-s0.json").exists()
    with pytest.raises(UserError, match="--methods slice: trained weights are compressed without training; allowed: pca,"):
        compress.fit_all(weights, "market", tmp_path, methods=["slice"], root=str(market))
    with pytest.raises(UserError, match="--dims=32: allowed is 1 to 31: a-s0.safetensors has embeddings of 32"):
        compress.fit_all(weights, "market", tmp_path, sizes=[32], root=str(market))


def test_a_network_trained_anew_in_its_folder_replaces_what_was_fitted_and_says_so(trained, market, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / trained.name))
    path = folder / f"{NAME}-cut8-s0.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "mAP": 0, "made_from": {**before["made_from"], "sha256": "of the former"}}))
    compress.fit_all(folder / f"{NAME}-s0.safetensors", "market", folder, methods=["cut"], sizes=[8, 4], root=str(market))
    lines = capsys.readouterr().err.splitlines()
    assert f"{NAME}-cut8-s0 taken away: made of other weights than" in lines[0]
    assert [line.split(":")[0] for line in lines if "mAP" in line] == ["cut8"]
    assert json.loads(path.read_text())["mAP"] == before["mAP"]


def test_fits_of_another_dataset_of_that_name_are_not_taken_for_these(trained, market, tmp_path):
    other = planted.write_dataset(tmp_path / "other", planted.texture, identities=7, test_identities=5)
    weights, options = trained / f"{NAME}-s0.safetensors", {"methods": ["cut"], "sizes": [4], "int8": "no"}
    compress.fit_all(weights, "market", tmp_path / "fits", root=str(market), **options)
    with pytest.raises(UserError, match="or of another dataset than is asked for: --overwrite"):
        compress.fit_all(weights, "market", tmp_path / "fits", root=str(other), **options)


def test_fits_are_written_one_by_one(trained, market, tmp_path, monkeypatch, capsys):
    weights, options = trained / f"{NAME}-s0.safetensors", {"sizes": [20, 4], "int8": "no", "root": str(market)}
    stopped = iter((False, True))
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(compress, "asked_to_stop", lambda: next(stopped))
        compress.fit_all(weights, "market", tmp_path, methods=["cut", "pq"], **options)
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{NAME}{m}-s0.json" for m in ("", "-cut20", "-cut4")}
    assert "pq of 20 bytes left out: a product quantiser of 32 dimensions has at most 16 here" in capsys.readouterr().err
    compress.fit_all(weights, "market", tmp_path, methods=["cut", "pq"], **options)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "mAP" in line] == ["pq4"]
    load = data.load  # and more axes than images span are found first
    monkeypatch.setattr(compress, "measure", lambda *a, **o: pytest.fail("measured first"))
    monkeypatch.setattr(data, "load", lambda *a, **o: replace(load(*a, **o), train=load(*a, **o).train[:9]))
    with pytest.raises(UserError, match="PCA to 20 dimensions: 9 training embeddings of 32 span at most 8"):
        compress.fit_all(weights, "market", tmp_path, methods=["pca"], **options)


def test_the_plain_fits_score_what_their_embeddings_score(trained, market):
    """The record of "cut" is that of the network's own first columns."""
    net = load_weights(trained / f"{NAME}-s0.safetensors")[0]
    splits = data.load("market", str(market))

    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net(images)[:, :8]

    metrics = autoreid.evaluate.evaluate(Cut(), splits.query, splits.gallery, (32, 16), splits.protocol)
    assert results(trained)["-cut8"]["mAP"] == pytest.approx(metrics.mAP, abs=1e-12)


# ---------------------------------------------------------------------------------------- side by side
def record(folder, name, seed, dims, dtype, bytes_, map_, **more):
    value = {"dataset": "market", "fingerprint": "f", "protocol": "market1501", "input": [32, 16], "views": 1,
             "recipe": "r", "init": "scratch", "train_fingerprint": "t", "queries": {"total": 10, "scored": 10},
             "embedding": {"dims": dims, "dtype": dtype, "bytes": bytes_}, "mAP": map_, "cmc": {"1": map_ + 0.1},
             "train": {"epochs": 10}, **more}
    (folder / f"{name}-s{seed}.json").write_text(json.dumps(value))


def test_the_table_is_over_seeds_and_its_changes_are_paired(tmp_path):
    for seed, full, pruned in ((0, 0.5, 0.4), (1, 0.6, 0.55), (2, 0.9, None)):
        record(tmp_path, "net", seed, 8, "float32", 32, full)
        if pruned:
            record(tmp_path, "net-prune4-int8", seed, 4, "int8", 4, pruned, recipe="other", init_epochs=10,
                   train={"epochs": 2})
    record(tmp_path, "net-pq2", 0, 8, "pq", 2, 0.3)
    record(tmp_path, "network-slice4", 0, 4, "float32", 16, 0.3)  # another model's
    found = compress.summary(tmp_path, "net", "market")
    full, pruned, pq = found["rows"]
    assert (full["method"], full["ratio"], full["seeds"], full["epochs"]) == ("full", 1.0, [0, 1, 2], 10)
    assert full["mAP"]["mean"] == pytest.approx(2 / 3) and full["mAP"]["std"] == pytest.approx(0.2081665999)
    assert (pruned["method"], pruned["dims"], pruned["bytes"], pruned["ratio"]) == ("prune", 4, 4, 8.0)
    assert pruned["epochs"] == 12 and pruned["change"] == pytest.approx(-0.075)  # of seeds 0 and 1
    assert (pq["method"], pq["bytes"], pq["ratio"], pq["mAP"]["std"]) == ("pq", 2, 16.0, None)
    text = compress.describe(found)
    assert "prune         4 int8          4   8.00x   47.5 ± 10.6   57.5 ± 10.6    -7.5     12  0,1" in text
    figure = plots_compress.curve(found)
    assert len(figure.axes) == 2 and "mean and standard deviation of seeds 0, 1, 2" in figure.get_suptitle()


@pytest.mark.parametrize(("more", "words"), [
    ({"recipe": "q"}, "results of recipe q and r would stand side by side"),
    ({"fingerprint": "g"}, "results of fingerprint f and g would stand side by side"),
    ({"init": "file", "init_sha256": "0"}, "results of init file and scratch would stand side by side"),
    ({"train_fingerprint": "g"}, "results of train_fingerprint g and t would stand side by side"),
])
def test_results_of_two_questions_are_refused(tmp_path, more, words):
    record(tmp_path, "net", 0, 8, "float32", 32, 0.5)
    record(tmp_path, "net-slice4", 1, 4, "float32", 16, 0.5, **more)
    with pytest.raises(UserError, match=words):
        compress.summary(tmp_path, "net", "market")
    with pytest.raises(UserError, match="holds no results of nut: `autoreid compress nut --dataset market` makes them"):
        compress.summary(tmp_path, "nut", "market")


def test_what_was_made_of_weights_that_are_no_more_is_left_out(tmp_path, capsys):
    for name, text in (("net", b"new"), ("net-int8", b"same")):
        (tmp_path / f"{name}-s0.safetensors").write_bytes(text)
    old, same = (hashlib.sha256(text).hexdigest() for text in (b"old", b"same"))
    record(tmp_path, "net", 0, 8, "float32", 32, 0.5)
    record(tmp_path, "net-int8", 0, 8, "int8", 8, 0.5)
    for name, dtype, sha in (("", "float32", old), ("-int8", "int8", same)):
        source = {"init": "pruned", "recipe": "s"}
        record(tmp_path, f"net-prune4{name}", 0, 4, dtype, 4, 0.4, **source, init_file=f"net{name}-s0.safetensors",
               init_sha256=sha)
        record(tmp_path, f"net-prune2{name}", 0, 2, dtype, 4, 0.3, **source, init_file=f"net-prune4{name}-s0.safetensors",
               init_sha256="its weights are not there")
    for seed in (0, 1):  # the weights of seed 1 are gone: believed
        made_from = {"file": f"net-s{seed}.safetensors", "sha256": old}
        record(tmp_path, "net-pca4", seed, 4, "float32", 16, 0.3, made_from=made_from)
    found = compress.summary(tmp_path, "net", "market")
    assert [(row["method"], row["dims"], row["dtype"], row["seeds"]) for row in found["rows"]] == [
        ("full", 8, "float32", [0]), ("full", 8, "int8", [0]), ("prune", 4, "int8", [0]), ("prune", 2, "int8", [0]),
        ("pca", 4, "float32", [1])]
    assert found["left_out"] == ["net-pca4-s0", "net-prune2-s0", "net-prune4-s0"]
    assert "net-pca4-s0, net-prune2-s0, net-prune4-s0 left out: made of other weights" in capsys.readouterr().err


def test_seeds_pruned_through_other_sizes_are_refused(tmp_path):
    for seed, source in ((0, "net-prune4"), (1, "net")):
        record(tmp_path, "net-prune2", seed, 2, "float32", 8, 0.3, init="pruned", init_file=f"{source}-s{seed}.safetensors")
    with pytest.raises(UserError, match="net-prune2-s1 was pruned from net there, another seed's was from net-prune4: "):
        compress.summary(tmp_path, "net", "market")


# ---------------------------------------------------------------------------------------- search
def test_a_larger_gallery_is_the_same_with_a_little_noise():
    features = torch.randn(50, 6) * torch.tensor([1, 2, 3, 4, 5, 0.0])
    large = compress.enlarged_gallery(features, 120)
    assert large.shape == (120, 6) and torch.equal(large[:50], features)
    assert torch.equal(large, compress.enlarged_gallery(features, 120))
    difference = large[50:100] - features
    assert torch.equal(difference[:, 5], torch.zeros(50)) and 0.05 < (difference / features.std(0))[:, :5].std() < 0.2
    assert compress.enlarged_gallery(features, 50) is features


def test_search_is_timed_on_the_full_and_the_smallest_embedding(trained, market, tmp_path):
    names = [path.stem for path in compress.smallest_weights(trained, NAME, 0)]
    assert names == [f"{NAME}-int8-s0", f"{NAME}-prune4-int8-s0"] and not compress.smallest_weights(trained, NAME, 1)
    found = compress.search(trained / f"{names[1]}.safetensors", "market", gallery=200, root=str(market))
    rows = {row["engine"]: row for row in found["rows"]}
    assert found["gallery"] == 200 and found["repeated"] and found["dims"] == 4 and found["images"] == 30
    assert rows["exact"]["recall"] == 1 and {"int8", "faiss-flat", "faiss-sq8", "faiss-hnsw"} <= set(rows)
    assert rows["int8"]["bytes"] < rows["exact"]["bytes"]
    with pytest.raises(UserError, match="--gallery 7: market has 30 gallery images; allowed: 30 or more"):
        compress.search(trained / f"{names[1]}.safetensors", "market", gallery=7, root=str(market))
    own = compress.search(trained / f"{names[1]}.safetensors", "market", root=str(market))
    assert not own["repeated"] and own["noise"] == 0


def test_without_faiss_the_own_engines_remain(trained, market, monkeypatch, capsys):
    def missing():
        raise UserError("faiss is not installed; pip install autoreid[gallery]")

    monkeypatch.setattr(compress, "import_faiss", missing)
    found = compress.search(trained / f"{NAME}-s0.safetensors", "market", root=str(market))
    assert [row["engine"] for row in found["rows"]] == ["exact", "int8"]
    assert "without faiss: faiss is not installed; pip install autoreid[gallery]" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the command
def test_the_command_trains_prints_a_table_and_draws_it(market, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["compress", "resnet18", "--dataset", "market", "--root", str(market), "--methods", "slice,prune,int8",
               "--dims", "4", *OPTIONS]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    found, folder = json.loads(out), Path("results/market") / f"{NAME}-compress"
    assert [(row["method"], row["dtype"], row["bytes"]) for row in found["rows"]] == [
        ("full", "float32", 128), ("full", "int8", 32), ("slice", "float32", 16), ("slice", "int8", 4),
        ("prune", "float32", 16), ("prune", "int8", 4), ("int8", "int8", 32)]
    assert json.loads((folder / "compress.json").read_text()) == found
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert f"next: autoreid compress resnet18 --dataset market --root {market} --methods slice,prune,int8 --dims 4" in err
    assert err.rstrip().endswith("--seed 1") and "--gallery" not in err
    assert "--epochs 2" in err.splitlines()[-1] and len(found["search"]) == 2
    for more, words in ((["--gallery", "3"], "--gallery 3: market has 30 gallery images"), (["--methods", ""], "no metho")):
        with monkeypatch.context() as patch:
            patch.setattr(compress, "retrain", lambda *a, **o: pytest.fail("trained first"))
            assert main([*command, *more]) == 2 and words in capsys.readouterr().err
    assert main([*command, "--gallery", "50", "--workers", "1", "--cache", "kept"]) == 0  # at once, from the records
    err = capsys.readouterr().err
    assert "--device cpu --workers 1 --cache kept --gallery 50 --set" in err.splitlines()[-1]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "ratio" in out and "recall" in out and err.count("is finished: nothing to resume") == 6


def test_the_command_compresses_weights_as_they_are(trained, market, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = str(trained / f"{NAME}-s0.safetensors")
    command = ["compress", weights, "--dataset", "market", "--root", str(market), "--dims", "4", "--device", "cpu"]
    assert main([*command, "--json", "--gallery", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]] == ["full", "pca", "pca", "pq", "int8", "cut", "cut"]
    assert found["search"][0]["gallery"] == 100 and len(found["search"]) == 1
    assert Path(f"results/market/{NAME}-s0-compress/{NAME}-cut4-s0.json").is_file()
    before = found["search"]
    assert main([*command, "--json"]) == 0  # of the gallery as it is: the other's figures stay
    search = json.loads(capsys.readouterr().out)["search"]
    assert [s["gallery"] for s in search] == [30, 100] and search[1:] == before
    for options, words in (
        (["--methods", ""], "no method is given; known: pca"),
        (["--epochs", "3"], "trained weights are compressed as they are; leave out --set, --epochs"),
        (["--dims", "4,x"], "--dims 4,x: give whole numbers as in 384,192,64"),
        (["--methods", "prune"], "--methods prune: trained weights are compressed without training"),
        (["--dims", "99"], "--dims=99: allowed is 1 to 31"),
        (["--gallery", "3"], "--gallery 3: market has 30 gallery images"),
    ):
        assert main([*command, *options]) == 2
        err = capsys.readouterr().err.splitlines()
        assert words in err[-1] and err[-1].startswith("autoreid: ")


# ---------------------------------------------------------------------------------------- the page
def test_the_pages_commands_parse_its_python_runs_and_its_table_is_exact():
    page = (Path(__file__).parent.parent / "docs" / "compression.md").read_text()
    lines = [line.split("#")[0].strip() for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
             for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile(code, "compression.md", "exec"), {})
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", page, re.M)
    assert rows == [tuple(map(str, (k, bytes_of(k), f"{ratio(768, k):.2f}", bytes_of(k, "int8"),
                                    f"{ratio(768, k, 'int8'):.2f}"))) for k in (768, *compress.PAPERS_SIZES)]
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.M) == ["--methods", *compress.METHODS]

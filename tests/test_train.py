"""The shared recipe, the loop that follows it, and the result it writes."""

import csv
import json
from dataclasses import asdict, replace

import planted
import pytest
import torch
from torch import nn

from autoreid import data
from autoreid.errors import UserError
from autoreid.loading import Augment
from autoreid.network import find_model, load_weights
from autoreid.runs import Run
from autoreid.train import RECIPES, Recipe, find_recipe, fit, make_optimizer, retrain, training_loss

SMALL = Recipe(
    input=(32, 16), optimizer="sgd", lr=0.02, epochs=2, warmup_epochs=0, identities=4, images=3, pad=2, erase=0.2
)
MODEL = {"width": 4, "stem": 3}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=8, test_identities=5)


def run(tmp_path, name="run") -> Run:
    return Run(tmp_path / name, {}, resume=False, overwrite=False)


# ---------------------------------------------------------------------------------------- the recipe
def test_learning_rates_of_every_schedule():
    cosine = Recipe(lr=1.0, lr_min=0.1, epochs=6, warmup_epochs=2)
    assert [cosine.learning_rate(e) for e in range(6)] == pytest.approx([0.1, 0.55, 1.0, 0.775, 0.325, 0.1])
    step = Recipe(lr=1.0, epochs=6, warmup_epochs=1, schedule="step", milestones=(3, 5))
    assert [step.learning_rate(e) for e in range(6)] == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01])


def test_the_key_changes_with_every_field():
    base = asdict(Recipe())
    other = {
        "input": (64, 32), "optimizer": "sgd", "schedule": "step", "milestones": (1, 2),
        **{k: v + 1 for k, v in base.items() if type(v) is int},
        **{k: v * 0.5 for k, v in base.items() if isinstance(v, float) and v},
    }
    keys = {replace(Recipe(), **{name: value}).key() for name, value in other.items()}
    assert len(keys | {Recipe().key()}) == len(other) + 1
    assert {"drop_path", "clip"} == set(base) - set(other)  # zero by default: changed by hand
    assert len({Recipe().key(), replace(Recipe(), clip=1.0).key(), replace(Recipe(), drop_path=0.1).key()}) == 3


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("default", {"epochs": "0"}, "epochs=0: allowed is 1 or more"),
    ("default", {"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'? known: adam, adamw, sgd"),
    ("default", {"margn": "1"}, "unknown recipe field 'margn'; did you mean 'margin'?"),
    ("default", {"flip": "2"}, "flip=2.0: allowed is from 0 to 1"),
    ("default", {"clip": "-1"}, "clip=-1.0: allowed is 0 (no clipping) or more"),
    ("default", {"margin": "nan"}, "margin=nan: margin must be a number (default 0.3)"),
    ("default", {"milestones": "x"}, "milestones=x: milestones must be whole numbers as in 2,2,2,2 (default (40, 50))"),
    ("default", {"drop_path": "2"}, "drop_path=2.0: allowed is from 0 to below 1"),
    ("fast", {}, "unknown recipe 'fast'; known: PATH/recipe.json, autoreid-iccv19, default, demo, drawn"),
])
def test_mistakes_are_named(name, changes, words):
    with pytest.raises(UserError) as fault:
        find_recipe(name, changes)
    assert str(fault.value).startswith(words)


def test_a_recipe_file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"epochs": 5, "warmup_epochs": 1, "input": [64, 32]}))
    recipe = find_recipe(str(path), {"lr": "0.5"})
    assert (recipe.epochs, recipe.input, recipe.lr) == (5, (64, 32), 0.5)
    for fields, words in (({"input": 5}, "input=5: input must be whole numbers"), ({"lr": None}, "lr=None: lr must be")):
        path.write_text(json.dumps(fields))
        with pytest.raises(UserError) as fault:
            find_recipe(str(path))
        assert str(fault.value).startswith(f"{path}: {words}")
    path.write_text(json.dumps({"epoch": 5}))
    with pytest.raises(UserError) as fault:
        find_recipe(str(path))
    assert str(fault.value).startswith(f"{path}: unknown recipe field 'epoch'; did you mean 'epochs'?")


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers(name):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(Recipe(optimizer=name, lr=0.5, momentum=0.7, weight_decay=0.25), [weight])
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name and (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert group.get("momentum", group.get("betas", (0,))[0]) == 0.7


# ---------------------------------------------------------------------------------------- the loop
def test_the_triplet_reads_before_and_the_classifier_after_the_neck():
    net = find_model("resnet18", MODEL).build()
    classifier = nn.Linear(net.dims, 2, bias=False)
    images, labels = torch.randn(4, 3, 32, 16), torch.tensor([0, 0, 1, 1])
    for recipe, neck_moves in ((replace(SMALL, ce_weight=0.0), False), (replace(SMALL, triplet_weight=0.0), True)):
        net.zero_grad(), classifier.zero_grad()
        training_loss(net, classifier, images, labels, recipe)[0].backward()
        moved = net.neck.weight.grad is not None and net.neck.weight.grad.abs().max() > 0
        assert moved == neck_moves


def test_training_learns_and_records_its_curve(market, tmp_path):
    samples = data.load("market", market, parts=("train",)).train
    torch.manual_seed(0)
    net = find_model("resnet18", MODEL).build()
    folder = run(tmp_path)
    training = fit(net, samples, replace(SMALL, epochs=6), folder, seed=0)
    rows = list(csv.DictReader((folder.folder / "curves.csv").open()))
    assert [int(r["epoch"]) for r in rows] == list(range(6))
    assert float(rows[-1]["loss_ce"]) < float(rows[0]["loss_ce"])
    assert training.epochs == 6 and training.images_per_second > 0 and training.peak_memory_bytes > 1e6


def test_the_same_seed_gives_the_same_losses_and_another_does_not(market, tmp_path):
    samples = data.load("market", market, parts=("train",)).train
    curves = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(seed)
        folder = run(tmp_path, str(i))
        fit(find_model("resnet18", MODEL).build(), samples, replace(SMALL, epochs=1), folder, seed=seed)
        curves.append((folder.folder / "curves.csv").read_text().splitlines()[1].rsplit(",", 1)[0])
    assert curves[0] == curves[1] != curves[2]


def test_the_recipes_augmentation_and_clipping_reach_the_loop(market, tmp_path, monkeypatch):
    import autoreid.train

    samples, seen = data.load("market", market, parts=("train",)).train, {}
    loader, clip = autoreid.train.TrainLoader, autoreid.train.nn.utils.clip_grad_norm_

    def watched(samples, labels, size, sampler, augment, *rest):
        seen.update(size=size, augment=augment, seed=rest[0], batch=len(sampler.batches(0)[0]))
        return loader(samples, labels, size, sampler, augment, *rest)

    def clipped(parameters, norm):
        seen["clip"] = norm
        return clip(parameters, norm)

    monkeypatch.setattr(autoreid.train, "TrainLoader", watched)
    monkeypatch.setattr(autoreid.train.nn.utils, "clip_grad_norm_", clipped)
    recipe = replace(SMALL, epochs=1, flip=0.25, pad=3, erase=0.75, clip=0.5)
    fit(find_model("resnet18", MODEL).build(), samples, recipe, run(tmp_path), seed=7)
    assert seen == {"size": (32, 16), "augment": Augment(0.25, 3, 0.75), "seed": 7, "batch": 12, "clip": 0.5}


def test_a_diverging_training_says_so(market, tmp_path):
    samples = data.load("market", market, parts=("train",)).train
    with pytest.raises(UserError, match=r"training diverged in epoch \d+: the loss is (nan|inf); lower the learning rate"):
        fit(find_model("resnet18", {**MODEL, "neck": "none"}).build(), samples, replace(SMALL, lr=1e30, epochs=4),
            run(tmp_path), seed=0)


# ---------------------------------------------------------------------------------------- the result
def test_a_result_has_the_contracts_fields_and_its_weights_give_its_figures(market, tmp_path):
    spec = find_model("resnet18", MODEL)
    path, result = retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3)
    assert path == tmp_path / "market" / "resnet18-stem3-width4-s3.json" and json.loads(path.read_text()) == result
    needed = {
        "model", "genotype", "dataset", "protocol", "recipe", "input", "seed", "init", "params", "macs", "embedding",
        "mAP", "mAP_trapezoid", "mINP", "cmc", "queries", "flip", "rerank", "latency_ms", "train", "environment",
    }
    assert needed <= set(result)
    assert set(result["train"]) == {"epochs", "seconds", "images_per_second", "peak_memory_bytes", "device"}
    assert result["embedding"] == {"dims": 32, "dtype": "float32", "bytes": 128}
    assert result["recipe"] == SMALL.key() and result["queries"]["total"] == 10
    assert result["split"] == "64 train, 10 query, 30 gallery images"

    from autoreid.evaluate import evaluate

    net, metadata = load_weights(path.with_suffix(".safetensors"))
    splits = data.load("market", str(market))
    assert evaluate(net, splits.query, splits.gallery, metadata["input"]).mAP == result["mAP"]

    with pytest.raises(UserError) as fault:
        retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3)
    assert str(fault.value) == (
        f"{path.with_suffix('')} already holds a finished run: add --resume to go on with it, --overwrite to start it "
        "anew, or write elsewhere with --out DIR or --name NAME")
    assert retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3, resume=True) == (path, result)
    with pytest.raises(UserError, match=r"was started with recipe\.lr=0\.02, now recipe\.lr=0\.5"):
        retrain(spec, "market", replace(SMALL, lr=0.5), tmp_path, root=str(market), seed=3, resume=True)


def test_the_papers_recipe():
    r = RECIPES["autoreid-iccv19"]
    assert (r.input, r.epochs, r.optimizer, r.lr, r.milestones, r.identities, r.images, r.margin) == (
        (384, 128), 240, "adam", 3.5e-3, (80, 150), 8, 4, 0.3)

"""The shared recipe, the loop that follows it, and the result it writes."""

import csv
import json
from dataclasses import asdict, replace

import planted
import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import nn

import autoreid.train
from autoreid import data
from autoreid.errors import UserError
from autoreid.loading import Augment, PKSampler
from autoreid.network import find_model, load_weights
from autoreid.recipe import RECIPES, Recipe, find_recipe
from autoreid.runs import Run, key_of
from autoreid.train import Criterion, fit, make_optimizer, retrain

SMALL = Recipe(
    input=(32, 16), optimizer="sgd", lr=0.02, epochs=2, warmup_epochs=0, identities=4, images=3, pad=2, erase=0.2
)
MODEL = {"width": 4, "stem": 3}
LATER = {  # fields of the recipe that the first recorded results did not have
    "triplet", "soft_margin", "literal_smoothing", "center_weight", "center_lr", "momentum_late", "enlarge",
    "swag_cycles", "swag_epochs", "swag_decay", "views",
}


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
    late = Recipe(lr=1.0, epochs=6, warmup_epochs=0, schedule="exponential", milestones=(2,), gamma=1e-4, momentum_late=0.5)
    assert [late.learning_rate(e) for e in range(6)] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001])
    assert [late.momentum_of(e) for e in range(6)] == [0.9, 0.9, 0.5, 0.5, 0.5, 0.5]
    swag = Recipe(lr=1.0, lr_min=0.0, epochs=1, warmup_epochs=0, swag_cycles=2, swag_epochs=3, swag_decay=0.5)
    assert swag.all_epochs == 7
    assert [swag.learning_rate(e) for e in range(1, 7)] == pytest.approx([1, 0.5, 0, 0.5, 0.25, 0])
    for cycle, decay, floor in ((35, 0.7, 0.0), (4, 0.5, 0.01), (2, 1.0, 0.1)):
        swag = Recipe(lr=0.3, lr_min=floor, epochs=1, warmup_epochs=0, swag_cycles=3, swag_epochs=cycle, swag_decay=decay)
        rates = [swag.learning_rate(e) for e in range(1, swag.all_epochs)]
        assert rates == pytest.approx(reference.cyclic_rates(3 * cycle, 0.3, cycle, decay, floor), abs=1e-15)
    sunk = Recipe(lr=1.0, lr_min=0.2, epochs=1, warmup_epochs=0, swag_cycles=3, swag_epochs=4, swag_decay=0.1)
    assert {sunk.learning_rate(e) for e in range(9, 13)} == {0.2}  # a peak of 0.01 would be below the floor


def test_the_papers_recipes_in_their_own_figures():
    robust = find_recipe("robust-reid")
    for t, rate in ((1, 3e-3), (2, 6e-3), (10, 3e-2), (150, 3e-2), (151, 3e-3), (225, 3e-3), (226, 3e-4), (350, 3e-4)):
        assert robust.learning_rate(t - 1) == pytest.approx(rate), t  # Eq. 1 counts epochs from 1
    swag = find_recipe("robust-reid-swag")
    assert swag.all_epochs - swag.epochs == 525
    peaks = [swag.learning_rate(350 + 35 * cycle) for cycle in range(15)]
    assert peaks == pytest.approx([3e-2 * 0.7**cycle for cycle in range(15)])
    assert find_recipe("robust-reid-swag", {"epochs": "10"}).all_epochs == 10 + 15
    safr = find_recipe("safr")
    assert safr.identities * safr.images == 72 and safr.learning_rate(0) == pytest.approx(0.1 * safr.lr)
    rates = [safr.learning_rate(e) / safr.lr for e in (9, 10, 19, 20, 30)]
    assert rates == pytest.approx([0.91, 1, 1, 0.6, 0.36]) and safr.center_weight == 0.0005
    dare = find_recipe("dare")
    batches = -(-12936 // 72)  # Market-1501
    assert dare.epochs * batches == pytest.approx(60_000, rel=0.01)
    assert dare.milestones[0] * batches == pytest.approx(30_000, rel=0.01)
    assert dare.learning_rate(dare.epochs - 1) == pytest.approx(3e-7, rel=0.05)
    assert find_recipe("autoreid").learning_rate(0) == 3.5e-3


def test_the_key_changes_with_every_field():
    base = asdict(Recipe())
    other = {
        "input": (64, 32), "optimizer": "sgd", "schedule": "step", "milestones": (1, 2),
        **{k: v + 1 for k, v in base.items() if type(v) is int},
        **{k: v * 0.5 for k, v in base.items() if isinstance(v, float) and v},
    }
    other |= {
        "triplet": "batch-soft", "soft_margin": True, "literal_smoothing": True, "center_weight": 0.1, "views": 2,
        "momentum_late": 0.5, "enlarge": 1.5, "drop_path": 0.1, "clip": 1.0,
    }
    keys = {replace(Recipe(), **{name: value}).key() for name, value in other.items()}
    assert set(other) == set(base) and len(keys | {Recipe().key()}) == len(other) + 1


def test_a_field_of_a_later_version_leaves_the_keys_of_recorded_results():
    """The key of a recipe that was recorded before the seeds' losses came: written down, so that it can not drift."""
    recorded = {name: value for name, value in asdict(Recipe()).items() if name not in LATER}
    assert Recipe().key() == key_of(recorded) != replace(Recipe(), soft_margin=True).key()


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("default", {"epochs": "0"}, "epochs=0: allowed is 1 or more"),
    ("default", {"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'? known: adam, adamw, sgd"),
    ("default", {"margn": "1"}, "unknown recipe field 'margn'; did you mean 'margin'?"),
    ("default", {"flip": "2"}, "flip=2.0: allowed is from 0 to 1"),
    ("default", {"clip": "-1"}, "clip=-1.0: allowed is 0 (no clipping) or more"),
    ("default", {"margin": "nan"}, "margin=nan: margin must be a number (default 0.3)"),
    ("default", {"milestones": "x"}, "milestones=x: milestones must be whole numbers as in 2,2,2,2 (default (40, 50))"),
    ("default", {"drop_path": "2"}, "drop_path=2.0: allowed is from 0 to below 1"),
    ("fast", {}, "unknown recipe 'fast'; known: PATH/recipe.json, autoreid, dare, default, demo, drawn, "),
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
    images, labels = torch.randn(4, 3, 32, 16), torch.tensor([0, 0, 1, 1])
    for recipe, neck_moves in ((replace(SMALL, ce_weight=0.0), False), (replace(SMALL, triplet_weight=0.0), True)):
        net.zero_grad()
        Criterion(net.branch_dims, 2, recipe)(net.branches(images), labels).total.backward()
        gradient = net.head.neck.weight.grad
        assert (gradient is not None and gradient.abs().max() > 0) == neck_moves


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
    samples, seen = data.load("market", market, parts=("train",)).train, {}
    loader, clip = autoreid.train.TrainLoader, autoreid.train.nn.utils.clip_grad_norm_

    def watched(samples, labels, size, sampler, augment, *rest, **options):
        seen.update(size=size, augment=augment, seed=rest[0], batch=len(sampler.batches(0)[0]))
        return loader(samples, labels, size, sampler, augment, *rest, **options)

    def clipped(parameters, norm):
        seen["clip"] = norm
        return clip(parameters, norm)

    monkeypatch.setattr(autoreid.train, "TrainLoader", watched)
    monkeypatch.setattr(autoreid.train.nn.utils, "clip_grad_norm_", clipped)
    recipe = replace(SMALL, epochs=1, flip=0.25, pad=3, erase=0.75, clip=0.5)
    fit(find_model("resnet18", MODEL).build(), samples, recipe, run(tmp_path), seed=7)
    assert seen == {"size": (32, 16), "augment": Augment(0.25, 3, 0.75), "seed": 7, "batch": 12, "clip": 0.5}


def test_every_branch_has_every_loss_and_they_add_up():
    """Against the sum written out; the weight of the center loss reaches the features and not the centers."""
    recipe = replace(SMALL, ce_weight=0.5, triplet_weight=2.0, triplet="batch-soft", soft_margin=True, center_weight=0.1)
    net = find_model("resnet18", {**MODEL, "head": "exits", "hidden": 6, "embedding_dim": 5, "neck": "batch"}).build()
    criterion = Criterion(net.branch_dims, 3, recipe)
    assert [c.weight.shape for c in criterion.classifiers] == [(3, 5)] * 5 and len(criterion.centers) == 5
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 0, 1, 1, 2, 2])
    branches = net.branches(images)
    losses = criterion(branches, labels)
    ce = sum(reference.smoothed_cross_entropy((b.classified @ c.weight.T).detach(), labels, 0.1, False)
             for b, c in zip(branches, criterion.classifiers, strict=True))
    triplet = sum(reference.batch_soft_triplet(b.metric, labels, "soft") for b in branches)
    center = sum(0.05 * (b.metric - c.centers[labels]).square().sum()
                 for b, c in zip(branches, criterion.centers, strict=True))
    for ours, theirs in zip(losses, (0.5 * ce + 2 * triplet + center, ce, triplet, center), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (*net.parameters(), *criterion.parameters())
               if p.requires_grad)


@pytest.mark.parametrize("changes", [
    {"center_weight": 0.01, "swag_cycles": 2, "swag_epochs": 2},
    {"optimizer": "adam", "lr": 1e-3, "schedule": "exponential", "milestones": (1,), "momentum_late": 0.5, "ce_weight": 0.0,
     "enlarge": 1.25, "epochs": 4},
])
def test_a_resumed_training_ends_in_the_same_state(market, tmp_path, changes, monkeypatch):
    samples = data.load("market", market, parts=("train",)).train
    recipe = replace(SMALL, **changes)

    def trained(folder, resume=False):
        torch.manual_seed(0)
        net = find_model("resnet18", MODEL).build()
        fit(net, samples, recipe, Run(folder, {}, resume=resume, overwrite=False), seed=0)
        return net.state_dict()

    whole = trained(tmp_path / "whole")
    save = Run.save

    def stop_after(run, state):
        save(run, state)
        if state["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", stop_after)
        trained(tmp_path / "halves")
    assert len((tmp_path / "halves" / "curves.csv").read_text().splitlines()) == 4
    again = trained(tmp_path / "halves", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_swag_gives_the_mean_of_the_cycles_ends_and_fresh_statistics(market, tmp_path, monkeypatch):
    samples, collected = data.load("market", market, parts=("train",)).train, []
    collect = autoreid.train.SWAG.collect

    def watched(swag, net):
        collected.append({name: p.detach().clone() for name, p in net.named_parameters()})
        collect(swag, net)

    monkeypatch.setattr(autoreid.train.SWAG, "collect", watched)
    net = find_model("resnet18", MODEL).build()
    recipe = replace(SMALL, epochs=1, swag_cycles=3, swag_epochs=2)
    folder = run(tmp_path)
    training = fit(net, samples, recipe, folder, seed=0)
    assert training.epochs == 7 and len(collected) == 3
    saved = load_file(folder.folder / "swag.safetensors")
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        ends = torch.stack([weights[name] for weights in collected])
        torch.testing.assert_close(parameter.detach(), ends.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saved[f"mean.{name}"], ends.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saved[f"variance.{name}"], ends.var(0, correction=0), rtol=1e-3, atol=1e-8)
    norm = net.backbone.stem[1]
    assert norm.num_batches_tracked == len(PKSampler([s.identity for s in samples], 4, 3))


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
    r = RECIPES["autoreid"]
    assert (r.input, r.epochs, r.optimizer, r.lr, r.milestones, r.identities, r.images, r.margin) == (
        (384, 128), 240, "adam", 3.5e-3, (80, 150), 8, 4, 0.3)

"""The shared recipe, the loop that follows it, and the result it writes."""

import copy
import csv
import json
import shutil
from dataclasses import replace

import planted
import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import nn

import autoreid.train
from autoreid import data
from autoreid.errors import UserError
from autoreid.evaluate import Evaluation
from autoreid.loading import Augment, PKSampler
from autoreid.network import find_model, load_weights
from autoreid.recipe import Recipe
from autoreid.runs import Preempted, Run
from autoreid.train import Criterion, fit, make_optimizer, retrain

SMALL = Recipe(
    input=(32, 16), optimizer="sgd", lr=0.02, epochs=2, warmup_epochs=0, identities=4, images=3, pad=2, erase=0.2
)
MODEL = {"width": 4, "stem": 3}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=8, test_identities=5)


def run(tmp_path, name="run") -> Run:
    return Run(tmp_path / name, {}, resume=False, overwrite=False)


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
    assert set(result["train"]) == {"epochs", "seconds", "images_per_second", "peak_memory_bytes", "device", "processes",
                                    "val_mAP"}
    assert result["embedding"] == {"dims": 32, "dtype": "float32", "bytes": 128}
    assert result["recipe"] == SMALL.key() and result["queries"]["total"] == 10
    assert result["split"] == "64 train, 10 query, 30 gallery images" and result["warnings"] == []
    splits = data.load("market", str(market))
    for name, parts in (("fingerprint", ("query", "gallery")), ("train_fingerprint", ("train",))):
        assert result[name] == data.fingerprint(splits, parts)

    from autoreid.evaluate import evaluate

    net, metadata = load_weights(path.with_suffix(".safetensors"))
    assert evaluate(net, splits.query, splits.gallery, metadata["input"]).mAP == result["mAP"]

    with pytest.raises(UserError) as fault:
        retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3)
    assert str(fault.value) == (
        f"{path.with_suffix('')} already holds a finished run: add --resume to go on with it, --overwrite to start it "
        "anew, or write elsewhere with --out DIR or --name NAME")
    assert retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3, resume=True) == (path, result)
    config = path.with_suffix("") / "config.json"  # of a run that was begun before retrain had a protocol to choose
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "protocol"}))
    assert retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3, resume=True) == (path, result)
    with pytest.raises(UserError, match="was started with protocol=None, now protocol=plain"):
        retrain(spec, "market", SMALL, tmp_path, root=str(market), seed=3, resume=True, protocol="plain")
    with pytest.raises(UserError, match=r"was started with recipe\.lr=0\.02, now recipe\.lr=0\.5"):
        retrain(spec, "market", replace(SMALL, lr=0.5), tmp_path, root=str(market), seed=3, resume=True)


def test_the_split_says_what_was_trained(market, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(market, copy)
    bad = sorted((copy / "Market-1501-v15.09.15" / "bounding_box_train").iterdir())[0]
    bad.write_bytes(b"no picture")
    spec, recipe = find_model("resnet18", MODEL), replace(SMALL, epochs=1, held_out=0.3)
    path, result = retrain(spec, "market", recipe, tmp_path, root=str(copy), how=Evaluation(skip_unreadable=True))
    assert f"left out, as it cannot be read: {bad}" in capsys.readouterr().err
    # with what is held out to watch: how many these are differs from seed to seed, and seeds are to be compared
    assert result["split"] == "63 train, 10 query, 30 gallery images"
    assert (result["train_images"], result["train_unreadable"], result["unreadable"]) == (63, 1, 0)


def test_weights_that_say_little_of_their_training_ask_the_result_beside_them(market, tmp_path):
    path, result = retrain(find_model("resnet18", MODEL), "market", replace(SMALL, epochs=1), tmp_path, root=str(market),
                           name="mine")
    weights, tested = path.with_suffix(".safetensors"), data.load("market", str(market), parts=("query", "gallery"))
    _, metadata = load_weights(weights)
    told = autoreid.train.again(weights, metadata, tested)
    assert {**told, "environment": 0} == {key: 0 if key == "environment" else result[key] for key in told}
    old = {key: value for key, value in metadata.items() if key not in ("name", "origin", "epochs", "leaks")}
    told = autoreid.train.again(weights, old, tested)
    assert (told["model"], told["train"], told["trained_on"], told["split"]) == ("mine", result["train"], "market", None)
    path.write_text("{")  # or of another seed: then it is not theirs
    told = autoreid.train.again(weights, old, tested)
    assert "model" not in told and told["train"] is None
    path.write_text(json.dumps({**result, "seed": 1}))
    assert autoreid.train.again(weights, metadata, tested)["train"] == {"epochs": 1}


# ---------------------------------------------------------------------------------------- the loop's possibilities
def trained(market, folder, recipe, resume=False, **options):
    """(the net's state, Training) of a small training."""
    samples = data.load("market", market, parts=("train",)).train
    torch.manual_seed(0)
    net = find_model("resnet18", MODEL).build()
    training = fit(net, samples, recipe, Run(folder, {}, resume=resume, overwrite=False), seed=0, **options)
    return net.state_dict(), training


def test_an_accumulated_step_is_one_by_the_mean_gradient(market, tmp_path):
    samples = data.load("market", market, parts=("train",)).train
    torch.manual_seed(0)
    learner = autoreid.train.Learner(find_model("resnet18", MODEL).build(), 8, replace(SMALL, accumulate=3), 0, "cpu")
    twin = copy.deepcopy(learner.net), copy.deepcopy(learner.criterion)
    images = [torch.stack([torch.randn(3, 32, 16) for _ in range(12)]) for _ in range(3)]
    labels = torch.arange(4).repeat_interleave(3)
    learner.module.train(), twin[0].train()
    losses = learner.step([(x, labels) for x in images])
    totals = [twin[1](twin[0].branches(x), labels).total for x in images]
    gradients = torch.autograd.grad(sum(totals) / 3, [p for p in twin[0].parameters() if p.requires_grad])
    parameters = [p for p in learner.net.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert float(losses[0]) == pytest.approx(float(sum(totals)) / 3, rel=1e-5)
    batches = len(PKSampler([s.identity for s in samples], 4, 3))
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = autoreid.train.Learner.step
        patch.setattr(autoreid.train.Learner, "step", lambda self, group: steps.append(len(group)) or step(self, group))
        trained(market, tmp_path / "run", replace(SMALL, epochs=1, accumulate=3))
    assert sum(steps) == batches and steps[:-1] == [3] * (len(steps) - 1)  # the last step has what is left


def test_ema_and_swa_deploy_their_averages(market, tmp_path, monkeypatch):
    """EMA: the average's state as it is. SWA: the mean over the last epochs' ends, with new statistics."""
    seen = []
    end = autoreid.train.Learner.end_epoch

    def watched(learner, epoch):
        seen.append({name: p.detach().clone() for name, p in learner.net.named_parameters()})
        end(learner, epoch)

    monkeypatch.setattr(autoreid.train.Learner, "end_epoch", watched)
    plain, _ = trained(market, tmp_path / "plain", replace(SMALL, epochs=4))
    ends, seen[:] = list(seen), []
    swa, _ = trained(market, tmp_path / "swa", replace(SMALL, epochs=4, swa_epochs=3))
    for name, parameter in ends[-1].items():
        mean = torch.stack([weights[name] for weights in ends[1:]]).mean(0)
        torch.testing.assert_close(swa[name], mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(plain[name], parameter)
    norm = "backbone.stem.1.running_mean"
    assert not torch.allclose(swa[norm], plain[norm], rtol=1e-4)
    ema, _ = trained(market, tmp_path / "ema", replace(SMALL, epochs=4, ema=0.9))
    assert any(not torch.allclose(ema[name], plain[name], rtol=1e-3) for name in ends[-1])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(seen[-4:], ends, strict=True) for name in a)  # same training


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_and_its_losses_and_weights_are_float32(market, tmp_path, amp):
    recipe = replace(SMALL, epochs=6, amp=amp)
    learner = autoreid.train.Learner(find_model("resnet18", MODEL).build(), 8, recipe, 0, "cpu")
    kinds = []
    learner.net.backbone.stem[0].register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
    learner.step([(torch.randn(6, 3, 32, 16), torch.arange(2).repeat_interleave(3))])
    assert kinds == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]]
    assert learner.scaler.is_enabled() == (amp == "fp16")
    state, _ = trained(market, tmp_path, recipe)
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def branches_and_gradients(recipe):
    """What the loop's network gives for fixed pictures, and a gradient through it, in float64; and the learner."""
    torch.manual_seed(0)
    learner = autoreid.train.Learner(find_model("resnet18", MODEL).build(), 2, recipe, 0, "cpu")
    learner.net.double().train()
    batch = torch.randn(8, 3, 32, 16, dtype=torch.float64), torch.arange(2).repeat_interleave(4)
    images, _ = autoreid.train.batch_on("cpu", batch, recipe.channels_last)
    (branch,) = learner.module.branches(images)
    parameters = [p for p in learner.net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(branch.classified.sin().sum() + branch.metric.cos().sum(), parameters)
    return [*branch, *gradients], learner


def test_channels_last_changes_nothing_but_rounding(market, tmp_path):
    plain, _ = branches_and_gradients(SMALL)
    last, learner = branches_and_gradients(replace(SMALL, channels_last=True))
    weight = learner.net.backbone.stem[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(last, plain, rtol=1e-8, atol=1e-10)
    state, _ = trained(market, tmp_path, replace(SMALL, epochs=1, channels_last=True))
    assert all(value.is_contiguous() for value in state.values())  # safetensors takes no other


@pytest.mark.slow
def test_a_compiled_network_is_the_same_but_for_rounding(market, tmp_path):
    plain, compiled = (branches_and_gradients(replace(SMALL, compile=on))[0] for on in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-8, atol=1e-10)
    trained(market, tmp_path, replace(SMALL, epochs=2, compile=True))


def test_classifier_dropout_drops_what_the_classifier_reads_and_no_metric(market, monkeypatch):
    recipe = replace(SMALL, classifier_dropout=0.5)
    learner = autoreid.train.Learner(find_model("resnet18", MODEL).build(), 2, recipe, 0, "cpu")
    seen = []
    monkeypatch.setattr(learner.criterion, "forward", lambda branches, labels: seen.append(branches[0]))
    images, labels = torch.randn(8, 3, 32, 16), torch.arange(2).repeat_interleave(4)
    learner.module.train()
    learner.module(images, labels)
    learner.module(images, labels)
    assert torch.equal(seen[0].metric, seen[1].metric)
    dropped = [branch.classified == 0 for branch in seen]
    assert all(0.4 < zeros.float().mean() < 0.6 for zeros in dropped) and not torch.equal(*dropped)
    learner.module.eval()
    learner.module(images, labels)
    assert (seen[2].classified == 0).float().mean() < 0.1


def test_held_out_identities_are_watched_and_never_trained(market, tmp_path, monkeypatch):
    splits = data.load("market", market, parts=("train",))
    told, trained_on = [], []
    fitting = autoreid.train.fit

    def watched(net, samples, *rest):
        trained_on.append(({s.identity for s in samples}, {s.identity for s in rest[-1]}))
        return fitting(net, samples, *rest, report=lambda *figures: told.append(figures))

    monkeypatch.setattr(autoreid.train, "fit", watched)
    recipe = replace(SMALL, epochs=5, held_out=0.4, eval_every=2)
    path, result = retrain(find_model("resnet18", MODEL), "market", recipe, tmp_path, root=str(market))
    (kept, held), = trained_on
    assert len(held) == 3 and not kept & held and kept | held == {s.identity for s in splits.train}
    assert [epoch for epoch, _ in told] == [2, 4, 5] and result["train"]["val_mAP"] == told[-1][1]
    rows = list(csv.DictReader((path.with_suffix("") / "curves.csv").open()))
    assert [bool(row["val_mAP"]) for row in rows] == [False, True, False, True, False]
    with pytest.raises(UserError, match=r"held_out=0.9: of 8 training identities 7 would be kept out; leave at least two"):
        retrain(find_model("resnet18", MODEL), "market", replace(recipe, held_out=0.9), tmp_path / "b", root=str(market))


@pytest.mark.parametrize("changes", [{"ema": 0.9, "accumulate": 2}, {"amp": "fp16", "classifier_dropout": 0.3},
                                     {"swa_epochs": 2, "amp": "bf16"}])
def test_stopped_in_mid_epoch_it_ends_in_the_same_state(market, tmp_path, monkeypatch, changes):
    recipe = replace(SMALL, epochs=3, **changes)
    whole, _ = trained(market, tmp_path / "whole", recipe)
    looks = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(autoreid.train, "asked_to_stop", lambda: next(looks) == 0)
        trained(market, tmp_path / "halves", recipe)
    state = Run(tmp_path / "halves", {}, resume=True, overwrite=False).load()
    assert (state["epoch"], state["batch"]) != (0, 0) and state["batch"] > 0
    again, _ = trained(market, tmp_path / "halves", recipe, resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    curves = [[row.rsplit(",", 1)[0] for row in (tmp_path / name / "curves.csv").read_text().splitlines()]
              for name in ("whole", "halves")]
    assert curves[0] == curves[1]


def test_stopped_in_an_evaluation_no_epoch_is_lost(market, tmp_path, monkeypatch):
    recipe = replace(SMALL, epochs=3, held_out=0.3, eval_every=1, swa_epochs=2)
    held = list(data.load("market", market, parts=("train",)).train)[:12]
    whole, _ = trained(market, tmp_path / "whole", recipe, held_out=held)
    mAP, looks = autoreid.train.Watch.mAP, iter(range(1000))

    def stopped(watch, net):
        if next(looks) == 1:
            raise Preempted
        return mAP(watch, net)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(autoreid.train.Watch, "mAP", stopped)
        trained(market, tmp_path / "halves", recipe, held_out=held)
    state = Run(tmp_path / "halves", {}, resume=True, overwrite=False).load()
    assert state["epoch"] == 1 and state["batch"] > 1  # all of the second epoch's
    again, _ = trained(market, tmp_path / "halves", recipe, resume=True, held_out=held)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_what_was_reported_before_a_stop_is_reported_again(market, tmp_path, monkeypatch):
    recipe, told = replace(SMALL, epochs=4, held_out=0.3, eval_every=1), []
    held = list(data.load("market", market, parts=("train",)).train)[:12]

    def stop(epoch, figure):
        told.append((epoch, figure))
        if epoch == 2 and len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(market, tmp_path / "run", recipe, held_out=held, report=stop)
    trained(market, tmp_path / "run", recipe, resume=True, held_out=held, report=stop)
    assert [epoch for epoch, _ in told] == [1, 2, 1, 2, 3, 4] and told[2] == (1, pytest.approx(told[0][1], abs=1e-6))

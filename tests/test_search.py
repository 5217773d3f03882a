"""The bilevel search: its steps against slow twins, what it may read, what it leaves behind, and planted problems."""

import csv
import json
import shutil

import pandas as pd
import planted
import pytest
import torch
from reference import batch_hard_triplet as slow_triplet
from reference import numerical_arch_gradient
from torch import nn

from autoreid import data
from autoreid.errors import UserError
from autoreid.genotype import Genotype
from autoreid.loading import load_images, normalise
from autoreid.runs import Run
from autoreid.search import (
    PRESETS,
    Searcher,
    SearchSettings,
    arch_step,
    architecture_loss,
    entropy,
    find_settings,
    first_order,
    retrieval_loss,
    run_epoch,
    search,
    search_data,
    second_order,
    statistics_untouched,
    weight_step,
)
from autoreid.space import SearchSpace

SMALL = SearchSettings(
    channels=4, layers=(1, 1), stem="half", input=(32, 16), identities=4, images=3, epochs=2, alpha_warmup=0, lr=0.05,
    alpha_milestones=(), pad=2, dropout=0.2,
)  # fmt: skip
REID = SearchSpace.load("reid")
TOY = SearchSpace("toy", ("none", "identity", "sep_conv_3x3"), nodes=1)


def settings(**changes) -> SearchSettings:
    from dataclasses import replace

    return replace(SMALL, **changes)


def batch(seed: int, identities: int = 4, dtype=torch.float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(3)
    return torch.randn(len(labels), 3, 32, 16, generator=generator, dtype=dtype), labels


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=10, test_identities=4)


def train_samples(market):
    return data.load("market", market, parts=("train",)).train


# ---------------------------------------------------------------------------------------- the two steps
@pytest.mark.parametrize("method", ["darts", "darts-2", "gdas"])
def test_after_an_architecture_step_no_weight_has_a_gradient_and_none_has_moved(method):
    searcher = Searcher(REID, settings(method=method), 4, seed=0, device="cpu")
    weight_step(searcher, batch(1))
    weights = [w.detach().clone() for w in searcher.weights]
    buffers = [b.clone() for b in searcher.net.buffers()]
    alphas = [a.detach().clone() for a in searcher.net.arch_parameters()]
    arch_step(searcher, batch(1), batch(2))
    assert all(w.grad is None for w in searcher.weights)
    assert all(torch.equal(a, b) for a, b in zip(weights, searcher.weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alphas, searcher.net.arch_parameters(), strict=True))
    # the running statistics, with which the supernet is validated, have seen no validation picture
    assert all(torch.equal(a, b) for a, b in zip(buffers, searcher.net.buffers(), strict=True))


def test_a_weight_step_does_not_move_the_alphas():
    for method in ("darts", "gdas"):
        searcher = Searcher(REID, settings(method=method), 4, seed=0, device="cpu")
        alphas = [a.detach().clone() for a in searcher.net.arch_parameters()]
        weight_step(searcher, batch(1))
        assert all(torch.equal(a, b) and b.grad is None for a, b in
                   zip(alphas, searcher.net.arch_parameters(), strict=True))


def test_operations_that_gdas_did_not_draw_keep_weights_and_momentum():
    searcher = Searcher(REID, settings(method="gdas", weight_decay=0.1), 4, seed=0, device="cpu")
    before = {n: p.detach().clone() for n, p in searcher.net.named_parameters()}
    weight_step(searcher, batch(1))
    still = [n for n, p in searcher.net.named_parameters() if ".operations." in n and torch.equal(before[n], p)]
    moved = [n for n, p in searcher.net.named_parameters() if ".operations." in n and not torch.equal(before[n], p)]
    assert len(still) > len(moved) > 0  # one of seven runs


def double_searcher(method: str) -> Searcher:
    searcher = Searcher(TOY, settings(method=method, dropout=0.0, lr=0.02, weight_decay=0.01), 4, 0, "cpu")
    searcher.net.double()
    searcher.classifier.double()
    weight_step(searcher, batch(3, dtype=torch.double))  # gives the optimiser its momentum
    with torch.no_grad():
        for alpha in searcher.net.arch_parameters():
            alpha.normal_(generator=torch.Generator().manual_seed(0))
    return searcher


def test_first_order_gradient_equals_finite_differences():
    searcher = double_searcher("darts")
    val = batch(5, dtype=torch.double)
    _, found = first_order(searcher, None, val)
    for alpha, gradient in zip(searcher.net.arch_parameters(), found, strict=True):
        expected = numerical_arch_gradient(lambda: first_order(searcher, None, val)[0].item(), alpha)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_second_order_gradient_equals_finite_differences_of_the_unrolled_loss():
    """d/dalpha of L_val(w - eta (mu buffer + dL_train/dw + decay w), alpha), in float64, by moving alpha itself."""
    searcher = double_searcher("darts-2")
    train, val = batch(4, dtype=torch.double), batch(5, dtype=torch.double)
    optimizer = searcher.weight_optimizer
    group = optimizer.param_groups[0]

    def unrolled_loss() -> float:
        saved = [w.detach().clone() for w in searcher.weights]
        loss = retrieval_loss(searcher, train, searcher.edge_weights(detach=True))[0]
        gradients = torch.autograd.grad(loss, searcher.weights)
        with torch.no_grad():
            for w, g in zip(searcher.weights, gradients, strict=True):
                buffer = optimizer.state[w]["momentum_buffer"]
                w -= group["lr"] * (group["momentum"] * buffer + g + group["weight_decay"] * w)
            value = first_order(searcher, None, val)[0].item()
            for w, old in zip(searcher.weights, saved, strict=True):
                w.copy_(old)
        return value

    def value() -> float:
        with torch.enable_grad():
            return unrolled_loss()

    # a tiny difference for the Hessian-vector product: ReLUs and the hardest triplet do not switch within it
    _, found = second_order(searcher, train, val, epsilon=1e-5)
    _, coarse = second_order(searcher, train, val)
    _, first = first_order(searcher, None, val)
    for alpha, fine, usual, plain in zip(searcher.net.arch_parameters(), found, coarse, first, strict=True):
        expected = numerical_arch_gradient(value, alpha, eps=1e-6)
        torch.testing.assert_close(fine, expected, rtol=1e-4, atol=1e-7)
        # DARTS' own .01 is an approximation, and still far nearer than leaving the second term out
        assert (plain - expected).norm() > 2 * (usual - expected).norm()


def test_second_order_restores_weights_statistics_and_random_state_exactly():
    searcher = Searcher(REID, settings(method="darts-2"), 4, seed=0, device="cpu")
    weight_step(searcher, batch(1))
    state = {k: v.clone() for k, v in searcher.net.state_dict().items()}
    rng = torch.get_rng_state()
    arch_step(searcher, batch(1), batch(2))
    for alpha, kind in zip(searcher.net.arch_parameters(), ("normal", "reduction"), strict=True):
        alpha.data = state[f"alphas.{kind}"].clone()
    assert all(torch.equal(state[k], v) for k, v in searcher.net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


# ---------------------------------------------------------------------------------------- schedules and settings
def test_schedules_reach_their_ends():
    s = settings(epochs=5, lr=0.1, lr_min=0.001, tau_max=10.0, tau_min=0.1, alpha_lr=0.02, alpha_milestones=(2, 4))
    searcher = Searcher(TOY, s, 4, 0, "cpu")
    seen = []
    for epoch in range(5):
        searcher.schedule(epoch)
        seen.append((searcher.weight_optimizer.param_groups[0]["lr"], searcher.tau,
                     searcher.alpha_optimizer.param_groups[0]["lr"]))
    rates, taus, alpha_rates = zip(*seen, strict=True)
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.001) and rates[2] == pytest.approx(0.0505)
    assert taus == pytest.approx((10, 7.525, 5.05, 2.575, 0.1))
    assert alpha_rates == pytest.approx((0.02, 0.02, 0.002, 0.002, 0.0002))


def test_the_papers_preset():
    p = PRESETS["autoreid-iccv19"]
    assert (p.channels, p.layers, p.input, p.identities * p.images, p.epochs) == (32, (2, 2, 2, 2), (384, 128), 16, 200)
    assert (p.lr, p.lr_min, p.alpha_lr, p.alpha_milestones, p.alpha_gamma) == (0.1, 0.001, 0.02, (60, 150), 0.1)
    assert (p.weight_decay, p.alpha_weight_decay, p.margin, p.ce_weight, p.split) == (5e-4, 5e-4, 0.3, 0.5, "image")


@pytest.mark.parametrize(("changes", "words"), [
    ({"epochs": "0"}, "epochs=0: allowed is 1 or more"),
    ({"method": "drats"}, "unknown method 'drats'; did you mean 'darts'? known: darts, darts-2, gdas"),
    ({"arch_loss": "ce"}, "arch_loss=ce with split=identity: the classifier knows no identity of the validation half; "
     "add --set split=image, or use arch_loss=triplet"),
    ({"clip": "-1"}, "clip=-1.0: allowed is 0 (no clipping) or more"),
    ({"momentum": "2"}, "momentum=2.0: allowed is from 0 to below 1"),
    ({"layers": "2"}, "layers=[2]: allowed is two stages or more, each with a cell"),
    ({"alpha_warmup": "200"}, "alpha_warmup=200: allowed is 0 to 199, below epochs, or the alphas would never be updated"),
    ({"epoch": "3"}, "unknown search settings field 'epoch'; did you mean 'epochs'?"),
    ({"lr": "fast"}, "lr=fast: lr must be a number (default 0.1)"),
    ({"input": "8x8"}, "input=8x8: allowed is HxW with both sides at least 16, as in 128x64"),
])
def test_bad_settings_are_named(changes, words):
    with pytest.raises(UserError) as fault:
        find_settings("default", changes)
    assert str(fault.value).startswith(words)


def test_fewer_epochs_than_the_warm_up_keep_part_of_it():
    """--epochs 3 with a preset whose warm-up is longer must not need a second option."""
    assert find_settings("default", {"epochs": "20"}).alpha_warmup == 1
    assert find_settings("default", {"epochs": "20"}).alpha_milestones == (6, 15)
    assert find_settings("default", {"epochs": "20", "alpha_warmup": "5"}).alpha_warmup == 5


def test_entropy_of_uniform_and_decided_edges():
    assert entropy(torch.full((2, 7), 1 / 7)) == pytest.approx(1.945910, abs=1e-6)
    assert entropy(torch.eye(7)) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------------------------- what it reads and writes
@pytest.mark.parametrize("split", ["identity", "image"])
def test_the_two_halves(market, split):
    samples = train_samples(market)
    halves = search_data(samples, settings(split=split, flip=0.0, pad=0), seed=0)  # pictures as they are on disk
    assert halves.train_images + halves.val_images == len(samples)
    validation = {s.identity for s in (*halves.query, *halves.gallery)}
    assert validation <= {s.identity for s in samples}
    seen = {}
    for name, loader in (("train", halves.train), ("val", halves.val)):
        pictures = [tuple(image.flatten().tolist()) for images, _ in loader.epoch(0) for image in images]
        seen[name] = set(pictures)
    of_path = {}
    for sample in samples:
        (image,) = normalise(load_images([sample], (32, 16)))
        of_path[tuple(image.flatten().tolist())] = sample
    train, val = ({of_path[p] for p in seen[name]} for name in ("train", "val"))
    assert train and val and not train & val  # no picture trains the weights and the alphas
    assert val <= {*halves.query, *halves.gallery}
    train_ids, val_ids = ({s.identity for s in half} for half in (train, val))
    if split == "identity":
        assert halves.classes == 5 and not train_ids & val_ids
    else:
        assert halves.classes == 10 and train_ids & val_ids


def test_a_dataset_of_one_camera_says_what_is_missing(tmp_path):
    planted.write_dataset(tmp_path, planted.texture, identities=8, cameras=1)
    with pytest.raises(UserError) as fault:
        search_data(train_samples(tmp_path), settings(), seed=0)
    assert str(fault.value) == (
        "no identity of the validation half is seen by two cameras, so retrieval cannot be validated: check the camera "
        "numbers with `autoreid data`, or add identities")


def test_an_identity_with_one_image_is_drawn_again_and_again(tmp_path):
    planted.write_dataset(tmp_path, planted.texture, identities=8, frames=3)
    folder = tmp_path / "Market-1501-v15.09.15" / "bounding_box_train"
    for path in sorted(folder.glob("0001_*"))[1:]:
        path.unlink()
    run = Run(tmp_path / "run", {}, resume=False, overwrite=False)
    search(TOY, train_samples(tmp_path), settings(epochs=1), run)
    assert Genotype.load(run.folder / "genotype.json").space == "toy"


@pytest.mark.parametrize("method", ["darts", "darts-2", "gdas"])
def test_a_search_records_itself(market, tmp_path, method):
    run = Run(tmp_path / "run", {"a": 1}, resume=False, overwrite=False)
    result = search(TOY, train_samples(market), settings(method=method, alpha_warmup=1), run, seed=0)
    rows = list(csv.DictReader((run.folder / "curves.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[0]["loss_alpha"] == "" and float(rows[1]["loss_alpha"]) >= 0  # the warm-up has no alpha step
    assert 0 <= float(rows[1]["val_mAP"]) <= 1 and float(rows[1]["tau"]) == pytest.approx(0.1)
    alphas = pd.read_csv(run.folder / "alphas.csv")
    assert len(alphas) == 2 * 2 * len(TOY.edges) * 3
    assert alphas.groupby(["epoch", "cell", "edge"]).weight.sum().sub(1).abs().max() < 1e-4
    written = Genotype.load(run.folder / "genotype.json")
    assert written == result.genotype and written.provenance["epoch"] == 2
    assert written.provenance["macro"] == {"channels": 8, "layers": [1, 1], "stem": "half"}
    summary = json.loads(run.summary.read_text())
    assert summary["device_hours"] > 0 and summary["peak_memory_bytes"] > 1e6 and summary["genotype"] == written.key()


@pytest.mark.parametrize("name", ["triplet", "retrieval", "ce"])
def test_the_architecture_losses_are_their_formulas(name):
    searcher = Searcher(TOY, settings(split="image", arch_loss=name, dropout=0.0, ce_weight=0.3), 4, 0, "cpu")
    images, labels = batch(2)
    with statistics_untouched(searcher.net):
        features = searcher.net(images, searcher.net.softmax_weights())
        got = architecture_loss(searcher, (images, labels)).item()
    ce = nn.functional.cross_entropy(searcher.classifier(features), labels).item()
    triplet = slow_triplet(features.tolist(), labels.tolist(), 0.3)
    expected = {"triplet": triplet, "ce": ce, "retrieval": 0.3 * ce + 0.7 * triplet}[name]
    assert got == pytest.approx(expected, rel=1e-4)


def test_clipping_and_decay_of_one_step():
    """A step of SGD without momentum moves the weights by lr * clip when the gradient is longer than clip; Adam's
    decay reaches the alphas."""
    def moved(clip: float) -> float:
        searcher = Searcher(TOY, settings(clip=clip, weight_decay=0.0, lr=0.5), 4, 0, "cpu")
        before = [w.detach().clone() for w in searcher.weights]
        weight_step(searcher, batch(1))
        return torch.cat([(a - b).flatten() for a, b in zip(before, searcher.weights, strict=True)]).norm().item()

    assert moved(0.01) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved(0.0) > 0.5 * 0.1  # 0: none
    groups = Searcher(TOY, settings(alpha_weight_decay=0.25, alpha_beta1=0.3), 4, 0, "cpu").alpha_optimizer.param_groups
    assert groups[0]["weight_decay"] == 0.25 and groups[0]["betas"] == (0.3, 0.999)


@pytest.mark.parametrize("loss", ["triplet", "retrieval", "ce"])
def test_every_architecture_loss_runs_with_the_image_split(market, tmp_path, loss):
    run = Run(tmp_path / loss, {}, resume=False, overwrite=False)
    search(TOY, train_samples(market), settings(split="image", arch_loss=loss, epochs=1), run)


def test_query_and_gallery_are_never_opened(market, tmp_path, monkeypatch):
    """They are deleted before the first epoch; the search neither notices nor ever lists them."""
    copy = tmp_path / "copy"
    shutil.copytree(market, copy)
    samples = data.load("market", copy, parts=("train",)).train
    assert all("bounding_box_train" in s.path for s in samples)

    import autoreid.search

    def delete_then_run(*arguments):
        for part in ("query", "bounding_box_test"):
            shutil.rmtree(copy / "Market-1501-v15.09.15" / part, ignore_errors=True)
        return run_epoch(*arguments)

    monkeypatch.setattr(autoreid.search, "run_epoch", delete_then_run)
    search(TOY, samples, settings(), Run(tmp_path / "run", {}, resume=False, overwrite=False))


def test_a_diverging_search_says_so(market, tmp_path):
    with pytest.raises(UserError, match=r"the search diverged: the training loss is (nan|inf); lower the learning rate"):
        searcher = Searcher(TOY, settings(), 4, 0, "cpu")
        nn.init.constant_(searcher.classifier[-1].weight, float("nan"))
        weight_step(searcher, batch(0))


# ---------------------------------------------------------------------------------------- planted problems
def final_weights(folder, draw, space, seed, **changes) -> pd.Series:
    """Mean softmax weight per kind of cell and operation after a short search on drawn identities."""
    planted.write_dataset(folder, draw, identities=changes.pop("people", 24), frames=changes.pop("frames", 4))
    base = {"channels": 6, "identities": 6, "images": 4, "alpha_lr": 0.05, "pad": 0, "flip": 0.0, "dropout": 0.0}
    run = Run(folder / "run", {}, resume=False, overwrite=False)
    search(space, data.load("market", folder, parts=("train",)).train, settings(**{**base, **changes}), run, seed)
    frame = pd.read_csv(run.folder / "alphas.csv")
    return frame[frame.epoch == frame.epoch.max()].groupby(["cell", "operation"]).weight.mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_the_convolution_that_a_texture_needs(tmp_path, seed):
    """A pattern on a random mean: pooling keeps the mean and loses the pattern, a convolution can read it."""
    space = SearchSpace("toy", ("max_pool_3x3", "sep_conv_3x3"), nodes=2)
    weights = final_weights(tmp_path, planted.texture, space, seed, epochs=20, alpha_warmup=4)
    for kind in ("normal", "reduction"):
        assert weights[kind, "sep_conv_3x3"] > 0.55


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_identity_in_one_stripe_raises_the_part_aware_weight(tmp_path, seed):
    """Above the share it began with, and above what it gets where the same colour fills the whole picture."""
    space = SearchSpace("stripes", ("part_aware", "max_pool_3x3", "avg_pool_3x3"), nodes=2)
    size = {"people": 40, "frames": 6, "identities": 10, "epochs": 16, "alpha_warmup": 4}
    stripe = final_weights(tmp_path / "stripe", planted.stripe, space, seed, **size)
    whole = final_weights(tmp_path / "whole", planted.whole, space, seed, **size)
    assert stripe["reduction", "part_aware"] > 1 / 3 + 0.03
    assert stripe["reduction", "part_aware"] > whole["reduction", "part_aware"] + 0.03
    assert stripe.xs("part_aware", level="operation").mean() > 1 / 3

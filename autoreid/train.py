"""One shared recipe for every network, the loop that follows it, and the single evaluation at its end.

A searched and a hand-designed network can only be compared when both were trained alike: the recipe is one value, and
its key stands in every result. Query and gallery are opened once, after the last epoch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoreid import cost, data
from autoreid.data import Sample, Splits
from autoreid.errors import UserError, unknown
from autoreid.evaluate import evaluate
from autoreid.heads import ReIDNet
from autoreid.loading import IMAGENET_MEAN, IMAGENET_STD, Augment, PKSampler, TrainLoader, relabel
from autoreid.losses import batch_hard_triplet, smoothed_cross_entropy
from autoreid.network import ModelSpec, save_weights
from autoreid.options import changed, read_json, require, require_ranges
from autoreid.runs import (
    Run,
    environment,
    key_of,
    peak_memory_bytes,
    progress,
    rows_up_to,
    say,
    write_json,
    write_text,
)

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the field's usual ones (Luo et al. 2019, "Bag of Tricks").

    ``identities`` x ``images`` make a batch. The learning rate rises linearly from ``lr`` / 10 over
    ``warmup_epochs``, then falls by ``schedule``: "cosine" to ``lr_min``, "step" by ``gamma`` at each milestone.
    ``pad`` (pixels) and ``flip``, ``erase`` (probabilities) are the augmentation; ``clip`` 0 means no clipping.
    """

    input: tuple[int, int] = (256, 128)
    optimizer: str = "adam"
    lr: float = 3.5e-4
    lr_min: float = 7e-7
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 60
    warmup_epochs: int = 10
    schedule: str = "cosine"
    milestones: tuple[int, ...] = (40, 50)
    gamma: float = 0.1
    identities: int = 16
    images: int = 4
    ce_weight: float = 1.0
    triplet_weight: float = 1.0
    margin: float = 0.3
    label_smoothing: float = 0.1
    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    drop_path: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"0 to {self.epochs}")
        require(len(self.input) == 2 and min(self.input) >= 16, "input", "x".join(map(str, self.input)),
                "HxW with both sides at least 16, as in 128x64")
        require(self.identities >= 2 and self.images >= 2, "identities, images", (self.identities, self.images),
                "2 or more each: a triplet needs a positive and a negative")
        require_ranges(
            self, lr=(1e-12, 1e40, "above 0"), lr_min=(0, self.lr, "from 0 to lr"), gamma=(0, 1, "from 0 to 1"),
            momentum=(0, 0.9999, "from 0 to below 1"), weight_decay=(0, 1e6, "0 or more"),
            ce_weight=(0, 1e6, "0 or more"), triplet_weight=(0, 1e6, "0 or more"), margin=(0, 1e6, "0 or more"),
            label_smoothing=(0, 0.9999, "from 0 to below 1"), drop_path=(0, 0.9999, "from 0 to below 1"),
            flip=(0, 1, "from 0 to 1"), erase=(0, 1, "from 0 to 1"), pad=(0, 4096, "0 or more pixels"),
            clip=(0, 1e12, "0 (no clipping) or more"),
        )
        require(self.ce_weight > 0 or self.triplet_weight > 0, "ce_weight, triplet_weight",
                (self.ce_weight, self.triplet_weight), "at least one above 0")

    def key(self) -> str:
        """Twelve hexadecimal digits; equal keys mean networks trained alike."""
        return key_of(asdict(self))

    def learning_rate(self, epoch: int) -> float:
        """The rate of ``epoch`` (from 0): a function of the epoch, so that a resumed run needs no schedule state."""
        if epoch < self.warmup_epochs:
            return self.lr * (0.1 + 0.9 * epoch / self.warmup_epochs)
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        fraction = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs - 1, 1)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * fraction)) / 2


# Recipes by name. "drawn" is for the drawn data on two CPU cores; "autoreid-iccv19" is section 4.1 of the paper, its
# learning rate taken literally (0.0035, ten times the usual one).
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "autoreid-iccv19": Recipe(
        input=(384, 128), lr=3.5e-3, epochs=240, warmup_epochs=0, schedule="step", milestones=(80, 150), identities=8,
        ce_weight=0.5, triplet_weight=0.5, label_smoothing=0.0, erase=0.0,
    ),
    "drawn": Recipe(
        input=(64, 32), optimizer="adamw", lr=3.5e-3, lr_min=1e-5, weight_decay=0.01, epochs=12, warmup_epochs=2,
        pad=4, erase=0.25,
    ),
}
RECIPES["demo"] = replace(RECIPES["drawn"], epochs=10)


def find_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe by name or from a JSON file of its fields, with ``changes`` applied."""
    if name.endswith(".json"):
        fields = read_json(name, "recipe")
        if not isinstance(fields, dict):
            raise UserError(f"{name}: a recipe is a JSON object of fields, got {type(fields).__name__}")
        try:
            recipe = changed(Recipe(), fields, "recipe")
        except UserError as fault:
            raise UserError(f"{name}: {fault}") from None
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        raise unknown("recipe", name, [*RECIPES, "PATH/recipe.json"])
    return changed(recipe, changes or {}, "recipe", ("warmup_epochs", "milestones"))


# ---------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Training:
    """What a training took."""

    epochs: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    device: str


def make_optimizer(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay)


def training_loss(
    net: ReIDNet, classifier: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, cross-entropy, triplet): the triplet on the features before the neck, the classifier after it
    (Luo et al. 2019, section 3.5)."""
    features = net.features(images)  # B x dims
    ce = smoothed_cross_entropy(classifier(net.neck(features)), labels, recipe.label_smoothing)
    triplet = batch_hard_triplet(features, labels, recipe.margin)
    return recipe.ce_weight * ce + recipe.triplet_weight * triplet, ce, triplet


def fit(
    net: ReIDNet, samples: Sequence[Sample], recipe: Recipe, run: Run, seed: int, device: str = "cpu", workers: int = 0
) -> Training:
    """Train ``net`` on ``samples`` by ``recipe``, in place; goes on from the run's checkpoint if there is one.

    After every epoch ``curves.csv`` and the checkpoint are written. Order, crops and erasing are functions of
    (seed, epoch, batch), so an interrupted training ends in the same state as one that was not.
    """
    labels, identities = relabel(samples)
    sampler = PKSampler(labels, recipe.identities, recipe.images, seed)
    augment = Augment(recipe.flip, recipe.pad, recipe.erase)
    loader = TrainLoader(samples, labels, recipe.input, sampler, augment, seed, workers)
    net.to(device)
    classifier = nn.Linear(net.dims, identities, bias=False).to(device)
    nn.init.normal_(classifier.weight, std=0.001)
    parameters = [p for p in (*net.parameters(), *classifier.parameters()) if p.requires_grad]
    optimizer = make_optimizer(recipe, parameters)
    run.open()
    first, seconds, memory, curves = 0, 0.0, 0, run.folder / "curves.csv"
    if (state := run.load()) is not None:
        net.load_state_dict(state["net"])
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        first, seconds, memory = state["epoch"], state["seconds"], state["memory"]
        say(f"resumed after epoch {first} of {recipe.epochs}")
    elif run.resumes:
        say("no epoch was finished: starting with the first")
    rows = rows_up_to(curves, first) or ["epoch,loss,loss_ce,loss_triplet,lr,seconds"]
    for epoch in range(first, recipe.epochs):
        begin = time.monotonic()
        rate = recipe.learning_rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        net.train()
        sums = [0.0, 0.0, 0.0]
        for images, batch_labels in progress(loader.epoch(epoch), len(loader), f"epoch {epoch + 1}"):
            losses = training_loss(net, classifier, images.to(device), batch_labels.to(device), recipe)
            if not torch.isfinite(losses[0]):
                raise UserError(
                    f"training diverged in epoch {epoch + 1}: the loss is {losses[0].item()}; lower the learning "
                    f"rate, as in --set lr={recipe.lr / 4:g}"
                )
            optimizer.zero_grad(set_to_none=True)
            losses[0].backward()
            if recipe.clip > 0:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            sums = [total + loss.item() for total, loss in zip(sums, losses, strict=True)]
        seconds += time.monotonic() - begin
        memory = max(memory, torch.cuda.max_memory_allocated() if "cuda" in device else peak_memory_bytes())
        means = [total / len(loader) for total in sums]
        rows.append(",".join([str(epoch), *(f"{value:.6g}" for value in (*means, rate, seconds))]))
        write_text(curves, "\n".join(rows) + "\n")
        run.save({
            "net": net.state_dict(), "classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if "cuda" in device else [],
            "epoch": epoch + 1, "seconds": seconds, "memory": memory,
        })
        left = seconds / (epoch + 1) * (recipe.epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{recipe.epochs}: ce {means[1]:.3f}, triplet {means[2]:.3f}, {left:.0f} s left")
    images_seen = recipe.epochs * len(loader) * recipe.identities * recipe.images
    return Training(recipe.epochs, seconds, images_seen / max(seconds, 1e-9), memory, device)


# ---------------------------------------------------------------------------------------- train, then measure once
def retrain(
    spec: ModelSpec,
    dataset: str,
    recipe: Recipe,
    out: str | Path,
    *,
    root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    flip: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    name: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train a model from scratch on a dataset's training identities, evaluate it once, write the result.

    Writes ``<out>/<dataset>/<name>-s<seed>.json`` (the result), ``.safetensors`` (the weights) and a folder of the
    same name (configuration, curves, checkpoint). Returns the result's path and value.
    """
    name = name or spec.label
    folder = Path(out) / dataset
    target = folder / f"{name}-s{seed}.json"
    require(bool(re.fullmatch(r"[\w.-]+", name)), "name", name, "letters, digits, '.', '_' and '-'")
    splits = data.load(dataset, root)  # names only: a missing query folder is better found before the training
    samples = splits.train
    genotype = spec.genotype.key() if spec.genotype else None  # where it came from is not the question
    config = {
        "model": {**spec.to_dict(), "genotype": genotype}, "dataset": dataset, "recipe": asdict(recipe), "seed": seed,
        "device": device, "train_images": len(samples),
    }
    results = (target, target.with_suffix(".safetensors"))
    run = Run(folder / f"{name}-s{seed}", config, resume=resume, overwrite=overwrite, results=results)
    if run.finished:
        say(f"{target} is finished: nothing to resume")
        return target, read_json(target, "result")
    torch.manual_seed(seed)
    net = spec.build(recipe.drop_path)
    training = fit(net, samples, recipe, run, seed, device, workers)
    net.eval()
    save_weights(
        results[1], net, spec, input=list(recipe.input), mean=IMAGENET_MEAN, std=IMAGENET_STD,
        resize="bilinear, antialiased", dataset=dataset, recipe=recipe.key(), seed=seed,
    )
    result = measure(net, spec, name, splits, recipe.input, device=device, flip=flip)
    result.update({
        "recipe": recipe.key(), "seed": seed, "init": "scratch", "train": asdict(training),
        "environment": environment(),
    })
    write_json(target, result)
    write_json(run.summary, {"result": target.name, "mAP": result["mAP"]})
    return target, result


def measure(
    net: ReIDNet,
    spec: ModelSpec,
    name: str,
    splits: Splits,
    size: tuple[int, int],
    *,
    device: str = "cpu",
    flip: bool = False,
    protocol: str | None = None,
) -> dict[str, Any]:
    """A result's figures: cost and latency of the net, and its retrieval metrics on the dataset's query and gallery."""
    protocol = protocol or splits.protocol
    metrics = evaluate(net, splits.query, splits.gallery, size, protocol, device=device, flip=flip)
    counted = cost.measure(spec.build, size)
    return {
        "model": name, "genotype": spec.genotype.key() if spec.genotype else None, "dataset": splits.name,
        "protocol": protocol,
        "split": f"{len(splits.train)} train, {len(splits.query)} query, {len(splits.gallery)} gallery images",
        "input": list(size), "params": counted.params, "macs": counted.macs,
        "embedding": {"dims": net.dims, "dtype": "float32", "bytes": 4 * net.dims},
        "mAP": metrics.mAP, "mAP_trapezoid": metrics.mAP_trapezoid, "mINP": metrics.mINP,
        "cmc": metrics.to_dict()["cmc"], "queries": {"total": metrics.total, "scored": metrics.scored},
        "flip": flip, "rerank": None, "latency_ms": cost.latency(net, size, device),
    }

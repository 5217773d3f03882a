"""The loop that follows a recipe, the same for every network, and the single evaluation at its end.

Query and gallery are opened once, after the last epoch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autoreid import cost, data
from autoreid.data import Sample, Splits
from autoreid.errors import UserError
from autoreid.evaluate import USUAL, Evaluation, evaluate
from autoreid.heads import Branch, ReIDNet
from autoreid.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    PKSampler,
    TrainLoader,
    finish,
    readable,
    relabel,
)
from autoreid.losses import LOSSES, CenterLoss, smoothed_cross_entropy
from autoreid.network import ModelSpec, save_weights
from autoreid.options import read_json, require
from autoreid.pretrained import load_imagenet, start_of, weights_file
from autoreid.recipe import Recipe
from autoreid.runs import (
    Run,
    environment,
    folder_name,
    peak_memory_bytes,
    progress,
    rows_up_to,
    say,
    write_bytes,
    write_json,
    write_text,
)
from autoreid.swag import SWAG, update_batch_norms


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


class Losses(NamedTuple):
    """Of one batch, each added up over the network's branches; cross-entropy and triplet before their weights."""

    total: Tensor
    ce: Tensor
    triplet: Tensor
    center: Tensor


class Criterion(nn.Module):
    """The recipe's losses on every branch of a network: a classifier and, where the recipe has them, centers for each.

    The triplet and center losses read a branch before its neck, the classifier after it (Luo et al. 2019, section 3.5).
    A loss of weight zero is not computed.
    """

    def __init__(self, branch_dims: Sequence[int], identities: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.classifiers = nn.ModuleList()
        for dims in branch_dims if recipe.ce_weight > 0 else ():
            classifier = nn.Linear(dims, identities, bias=False)
            nn.init.normal_(classifier.weight, std=0.001)
            self.classifiers.append(classifier)
        self.centers = nn.ModuleList(
            CenterLoss(identities, dims, recipe.center_weight) for dims in (branch_dims if recipe.center_weight > 0 else ())
        )

    def forward(self, branches: Sequence[Branch], labels: Tensor) -> Losses:
        recipe = self.recipe
        ce = triplet = center = torch.zeros((), device=labels.device)
        for classifier, b in zip(self.classifiers, branches, strict=bool(self.classifiers)):
            smoothing = None if recipe.literal_smoothing else recipe.label_smoothing
            ce = ce + smoothed_cross_entropy(classifier(b.classified), labels, smoothing, recipe.literal_smoothing)
        if recipe.triplet_weight > 0:
            margin = "soft" if recipe.soft_margin else recipe.margin
            for b in branches:
                triplet = triplet + LOSSES[recipe.triplet](b.metric, labels, margin)
        for loss, b in zip(self.centers, branches, strict=bool(self.centers)):
            center = center + loss(b.metric, labels)
        total = recipe.ce_weight * ce + recipe.triplet_weight * triplet + center
        return Losses(total, ce, triplet, center)


def fit(
    net: ReIDNet,
    samples: Sequence[Sample],
    recipe: Recipe,
    run: Run,
    seed: int,
    device: str = "cpu",
    workers: int = 0,
    cache: str | None = None,
) -> Training:
    """Train ``net`` on ``samples`` by ``recipe``, in place; goes on from the run's checkpoint if there is one.
    ``cache``: a folder for decoded pictures.

    After every epoch ``curves.csv`` and the checkpoint are written. Order, crops and erasing are functions of
    (seed, epoch, batch), so an interrupted training ends in the same state as one that was not.
    """
    labels, identities = relabel(samples)
    sampler = PKSampler(labels, recipe.identities, recipe.images, seed)
    augment = Augment(recipe.flip, recipe.pad, recipe.erase, recipe.enlarge)
    raw = "cuda" in device  # uint8 to the GPU, a quarter of the bytes, and finished there
    loader = TrainLoader(samples, labels, recipe.input, sampler, augment, seed, workers, cache=cache, raw=raw)
    net.to(device)
    criterion = Criterion(net.branch_dims, identities, recipe).to(device)
    parameters = [p for p in (*net.parameters(), *criterion.classifiers.parameters()) if p.requires_grad]
    optimizer = make_optimizer(recipe, parameters)
    center_optimizer = torch.optim.SGD(criterion.centers.parameters(), recipe.center_lr) if criterion.centers else None
    swag = SWAG(net) if recipe.swag_cycles else None
    run.open()
    first, seconds, memory, curves = 0, 0.0, 0, run.folder / "curves.csv"
    if (state := run.load()) is not None:
        net.load_state_dict(state["net"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        if swag is not None:
            swag.load_state_dict(state["swag"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        first, seconds, memory = state["epoch"], state["seconds"], state["memory"]
        say(f"resumed after epoch {first} of {recipe.all_epochs}")
    elif run.resumes:
        say("no epoch was finished: starting with the first")
    rows = rows_up_to(curves, first) or ["epoch,loss,loss_ce,loss_triplet,loss_center,lr,seconds"]
    for epoch in range(first, recipe.all_epochs):
        begin = time.monotonic()
        rate = recipe.learning_rate(epoch)
        set_rate(optimizer, rate, recipe.momentum_of(epoch))
        net.train()
        sums = [0.0, 0.0, 0.0, 0.0]
        for *pictures, batch_labels in progress(loader.epoch(epoch), len(loader), f"epoch {epoch + 1}"):
            losses = criterion(net.branches(on_device(pictures, device)), batch_labels.to(device))
            if not torch.isfinite(losses.total):
                raise UserError(
                    f"training diverged in epoch {epoch + 1}: the loss is {losses.total.item()}; lower the learning "
                    f"rate, as in --set lr={recipe.lr / 4:g}"
                )
            optimizer.zero_grad(set_to_none=True)
            criterion.centers.zero_grad(set_to_none=True)
            losses.total.backward()
            if recipe.clip > 0:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            if center_optimizer is not None:
                center_optimizer.step()
            sums = [total + loss.item() for total, loss in zip(sums, losses, strict=True)]
        if swag is not None and epoch >= recipe.epochs and (epoch + 1 - recipe.epochs) % recipe.swag_epochs == 0:
            swag.collect(net)
        seconds += time.monotonic() - begin
        memory = max(memory, torch.cuda.max_memory_allocated() if "cuda" in device else peak_memory_bytes())
        means = [total / len(loader) for total in sums]
        rows.append(",".join([str(epoch), *(f"{value:.6g}" for value in (*means, rate, seconds))]))
        write_text(curves, "\n".join(rows) + "\n")
        run.save({
            "net": net.state_dict(), "criterion": criterion.state_dict(), "optimizer": optimizer.state_dict(),
            "swag": swag.state_dict() if swag is not None else {},
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if "cuda" in device else [],
            "epoch": epoch + 1, "seconds": seconds, "memory": memory,
        })
        left = seconds / (epoch + 1) * (recipe.all_epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{recipe.all_epochs}: ce {means[1]:.3f}, triplet {means[2]:.3f}, {left:.0f} s left")
    if swag is not None:
        swag.mean_to(net)  # and the batch norms' statistics of the averaged weights, from one more pass over the images
        update_batch_norms(net, ((on_device(p, device), labels) for *p, labels in loader.epoch(recipe.all_epochs)))
        moments = {"mean": swag.means, "variance": {name: swag.variance(name) for name in swag.means}}
        write_bytes(run.folder / "swag.safetensors", save({
            f"{moment}.{name}": value for moment, values in moments.items() for name, value in values.items()
        }))
    images_seen = recipe.all_epochs * len(loader) * recipe.identities * recipe.images
    return Training(recipe.all_epochs, seconds, images_seen / max(seconds, 1e-9), memory, device)


def on_device(pictures: Sequence[Tensor], device: str) -> Tensor:
    """A loader's pictures, finished or raw (images uint8 and the boxes to erase), as the network's input."""
    images, *boxes = (tensor.to(device, non_blocking=True) for tensor in pictures)
    return finish(images, *boxes) if boxes else images


def set_rate(optimizer: torch.optim.Optimizer, rate: float, momentum: float) -> None:
    """The learning rate, and the momentum or Adam's beta 1, of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


# ---------------------------------------------------------------------------------------- train, then measure once
def retrain(
    spec: ModelSpec,
    dataset: str,
    recipe: Recipe,
    out: str | Path,
    *,
    root: str | None = None,
    test: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    how: Evaluation = USUAL,
    init: str = "scratch",
    cache: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    name: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train a model on a dataset's training identities, evaluate it once, write the result.

    ``init``: "scratch", "imagenet" (torchvision's weights) or a file of such weights. ``test`` is another dataset to
    evaluate on. ``how`` to evaluate; where its views are 1, the recipe's count. ``cache``: a folder for decoded pictures.

    Writes ``<out>/<test dataset>/<name>-s<seed>.json`` (the result), ``.safetensors`` (the weights) and a folder of the
    same name (configuration, curves, checkpoint). Returns the result's path and value.
    """
    name = name or spec.label + (f"-from-{folder_name(dataset)}" if test else "")
    folder = Path(out) / folder_name(test or dataset)
    target = folder / f"{name}-s{seed}.json"
    require(bool(re.fullmatch(r"[\w.-]+", name)), "name", name, "letters, digits, '.', '_' and '-'")
    start = check_start(spec, recipe, init)
    # Names only: a missing query folder is better found before the training.
    splits = data.load(dataset, root, parts=("train",) if test else data.PARTS)
    tested = data.load(test, root, parts=("query", "gallery")) if test else splits
    samples, unreadable = (readable(splits.train) if how.skip_unreadable else (list(splits.train), []))
    for path in unreadable:
        say(f"left out, as it cannot be read: {path}")
    genotype = spec.genotype.key() if spec.genotype else None  # where it came from is not the question
    how = replace(how, views=recipe.views) if how.views == 1 else how
    how.check(tested.protocol)  # now, not after the training
    config = {
        "model": {**spec.to_dict(), "genotype": genotype}, "dataset": dataset, "recipe": asdict(recipe), "seed": seed,
        **start, "test": test, "evaluation": how.to_dict(), "device": device, "train_images": len(samples),
    }
    results = (target, target.with_suffix(".safetensors"))
    run = Run(folder / f"{name}-s{seed}", config, resume=resume, overwrite=overwrite, results=results)
    if run.finished:
        say(f"{target} is finished: nothing to resume")
        return target, read_json(target, "result")
    torch.manual_seed(seed)
    net = spec.build(recipe.drop_path)
    if init != "scratch":
        load_imagenet(net.backbone, spec.name, None if init == "imagenet" else init)
    training = fit(net, samples, recipe, run, seed, device, workers, cache)
    net.eval()
    save_weights(
        results[1], net, spec, input=list(recipe.input), mean=IMAGENET_MEAN, std=IMAGENET_STD,
        resize="bilinear, antialiased", dataset=dataset, recipe=recipe.key(), seed=seed, init=start["init"],
    )
    result = measure(net, spec, name, tested, recipe.input, device=device, how=how)
    result.update({
        "trained_on": splits.name, "train_part": splits.train_part, "train_unreadable": len(unreadable),
        "split": f"{len(splits.train)} train, {len(tested.query)} query, {len(tested.gallery)} gallery images",
        "recipe": recipe.key(), "seed": seed, **start, "train": asdict(training),
        "environment": environment(),
    })
    write_json(target, result)
    write_json(run.summary, {"result": target.name, "mAP": result["mAP"]})
    return target, result


def check_start(spec: ModelSpec, recipe: Recipe, init: str) -> dict[str, str]:
    """Find a picture size or weights that the network cannot take before anything is written. Returns what the result
    says of the start: ``init`` "scratch", or of a file its name and SHA-256 too."""
    cost.measure(spec.build, recipe.input)  # on the meta device
    if init == "scratch":
        return {"init": "scratch"}
    with torch.device("meta"):
        backbone = spec.build().backbone
    return start_of(weights_file(backbone, spec.name, None if init == "imagenet" else init), spec.name)


def measure(
    net: ReIDNet,
    spec: ModelSpec,
    name: str,
    splits: Splits,
    size: tuple[int, int],
    *,
    device: str = "cpu",
    how: Evaluation = USUAL,
    protocol: str | None = None,
) -> dict[str, Any]:
    """A result's figures: cost and latency of the net, and its retrieval metrics on the dataset's query and gallery."""
    protocol = protocol or splits.protocol
    say(f"evaluating {len(splits.query)} queries against {len(splits.gallery)} gallery images, {how.views} view(s) each")
    metrics = evaluate(net, splits.query, splits.gallery, size, protocol, device=device, how=how)
    counted = cost.measure(spec.build, size)
    return {
        "model": name, "genotype": spec.genotype.key() if spec.genotype else None, "dataset": splits.name,
        "protocol": protocol,
        "split": f"{len(splits.train)} train, {len(splits.query)} query, {len(splits.gallery)} gallery images",
        "input": list(size), "params": counted.params, "macs": counted.macs,
        "embedding": {"dims": net.dims, "dtype": "float32", "bytes": 4 * net.dims},
        **{key: value for key, value in metrics.to_dict().items() if key not in ("total", "scored", "protocol")},
        "queries": {"total": metrics.total, "scored": metrics.scored},
        "flip": how.views > 1, **how.to_dict(), "latency_ms": cost.latency(net, size, device),
    }

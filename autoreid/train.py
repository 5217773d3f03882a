"""The loop that follows a recipe, the same for every network, and the single evaluation at its end.

Query and gallery are opened once, after the last epoch.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoreid import cost, data, parallel
from autoreid.averaging import averaged
from autoreid.compression import Branch, bytes_of, largest_columns
from autoreid.data import Sample, Splits
from autoreid.errors import UserError
from autoreid.evaluate import (
    USUAL,
    Evaluation,
    Extracted,
    check_task,
    evaluate,
    extract,
    extract_both,
    held_out_split,
    keep_out,
    without_cameras,
)
from autoreid.heads import ReIDNet
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
from autoreid.network import ModelSpec, check_same, load_same, load_weights, save_weights, wrote
from autoreid.options import read_json, require
from autoreid.pretrained import load_imagenet, sha256_of, start_of, weights_file
from autoreid.recipe import Recipe
from autoreid.runs import (
    Preempted,
    Run,
    asked_to_stop,
    environment,
    folder_name,
    key_of,
    peak_memory_bytes,
    progress,
    say,
    write_bytes,
    write_json,
)
from autoreid.swag import SWAG, update_batch_norms
from autoreid.tracking import Curves


# ---------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Training:
    """What a training took."""

    epochs: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    device: str
    processes: int = 1
    val_mAP: float | None = None  # on held-out training identities, where any were held out


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
    A loss of weight zero is not computed. ``classified_dims`` is what the classifiers read where that is wider than the
    branches: ``expand`` is then the second factor of a low-rank embedding, one for each branch (``autoreid.compression``).
    """

    def __init__(
        self, branch_dims: Sequence[int], identities: int, recipe: Recipe, classified_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.classifiers, self.expand = nn.ModuleList(), nn.ModuleList()
        for dims, wide in zip(branch_dims, classified_dims or branch_dims, strict=True) if recipe.ce_weight > 0 else ():
            classifier = nn.Linear(wide, identities, bias=False)
            nn.init.normal_(classifier.weight, std=0.001)
            self.classifiers.append(classifier)
            if wide != dims:
                self.expand.append(nn.Linear(dims, wide, bias=False))
        self.centers = nn.ModuleList(
            CenterLoss(identities, dims, recipe.center_weight) for dims in (branch_dims if recipe.center_weight > 0 else ())
        )

    def forward(self, branches: Sequence[Branch], labels: Tensor) -> Losses:
        recipe = self.recipe
        ce = triplet = center = torch.zeros((), device=labels.device)
        for number, (classifier, b) in enumerate(zip(self.classifiers, branches, strict=bool(self.classifiers))):
            smoothing = None if recipe.literal_smoothing else recipe.label_smoothing
            read = self.expand[number](b.classified) if self.expand else b.classified
            ce = ce + smoothed_cross_entropy(classifier(read), labels, smoothing, recipe.literal_smoothing)
        if recipe.triplet_weight > 0:
            margin = "soft" if recipe.soft_margin else recipe.margin
            for b in branches:
                triplet = triplet + LOSSES[recipe.triplet](b.metric, labels, margin)
        for loss, b in zip(self.centers, branches, strict=bool(self.centers)):
            center = center + loss(b.metric, labels)
        total = recipe.ce_weight * ce + recipe.triplet_weight * triplet + center
        return Losses(total, ce, triplet, center)

    def take_pruned(self, larger: Mapping[str, Tensor], chosen: Sequence[Tensor]) -> None:
        """The state of a criterion of wider branches, with ``chosen`` of each branch's dimensions."""
        branch = {name: chosen[int(name.split(".")[1])] for name in larger}  # classifiers.0.weight, centers.0.centers
        self.load_state_dict({name: value[:, branch[name].to(value.device)] for name, value in larger.items()})


class Diverged(UserError):
    """The loss is no number any more."""


class _Pass(nn.Module):
    """Pictures to losses, as one module for DDP to wrap.

    The network runs in the recipe's precision, the losses in float32. With several processes and ``gather`` they are
    those of the global batch, on every process: averaged over processes, the gradients are exactly this loss's.
    """

    def __init__(self, net: ReIDNet, criterion: Criterion, device: torch.device) -> None:
        super().__init__()
        self.net, self.criterion, self.device = net, criterion, device
        self.branches = torch.compile(net.branches) if criterion.recipe.compile else net.branches

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        recipe = self.criterion.recipe
        precision = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.amp]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            branches = self.branches(images)
        together = recipe.gather and parallel.processes() > 1
        joined = []
        for b in branches:
            metric, classified = b.metric.float(), b.classified.float()
            alike = b.classified is b.metric
            metric = parallel.gather(metric) if together else metric
            if alike and not recipe.classifier_dropout:
                classified = metric
            else:  # dropped before it is gathered: one mask for all processes
                classified = nn.functional.dropout(classified, recipe.classifier_dropout, self.training)
                classified = parallel.gather(classified) if together else classified
            joined.append(Branch(metric, classified))
        return self.criterion(joined, parallel.gather(labels) if together else labels)


class Learner:
    """All that a training changes: the net and its criterion, optimisers, averages. What a checkpoint holds."""

    def __init__(self, net: ReIDNet, identities: int, recipe: Recipe, seed: int, device: str) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        net.to(device)
        if recipe.channels_last:
            net.to(memory_format=torch.channels_last)
        if recipe.sync_bn and parallel.processes() > 1:
            parallel.synchronised(net, device)
        self.net = net
        self.criterion = Criterion(net.branch_dims, identities, recipe, net.classified_dims).to(device)
        learned = (*net.parameters(), *self.criterion.classifiers.parameters(), *self.criterion.expand.parameters())
        self.parameters = [p for p in learned if p.requires_grad]
        self.optimizer = make_optimizer(recipe, self.parameters)
        centers = list(self.criterion.centers.parameters())
        self.optimizers = [self.optimizer, *([torch.optim.SGD(centers, recipe.center_lr)] if centers else [])]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.average = averaged(net, recipe)
        self.swag = SWAG(net) if recipe.swag_cycles else None
        self.module: nn.Module = _Pass(net, self.criterion, self.device)
        if parallel.processes() > 1:  # without a classifier a neck may lie idle
            self.module = DistributedDataParallel(self.module, find_unused_parameters=recipe.ce_weight == 0)
            torch.manual_seed(seed + 10_007 * parallel.rank())  # each process drops other units

    def step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One step by the mean gradient of one batch or, when accumulating, several. Returns the four losses, each the
        mean over the batches, where the network is."""
        sums = torch.zeros(4, device=self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for number, (images, labels) in enumerate(batches, start=1):
            unsent = number < len(batches) and isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if unsent else nullcontext():  # type: ignore[union-attr, operator]
                losses = self.module(images, labels)
                self.scaler.scale(losses.total / len(batches)).backward()
            sums += torch.stack(tuple(losses)).detach()
        if self.recipe.clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.average is not None and self.recipe.ema > 0:
            self.average.update_parameters(self.net)
        return sums / len(batches)

    def end_epoch(self, epoch: int) -> None:
        """Collect the weights of ``epoch`` (from 0) where it is an end that SWA or SWAG averages over."""
        recipe = self.recipe
        if self.average is not None and 0 < recipe.epochs - epoch <= recipe.swa_epochs:
            self.average.update_parameters(self.net)
        if self.swag is not None and epoch >= recipe.epochs and (epoch + 1 - recipe.epochs) % recipe.swag_epochs == 0:
            self.swag.collect(self.net)

    @property
    def watched(self) -> nn.Module:
        """What the training would give if it ended now, but for SWA's and SWAG's means, whose statistics are not made
        before the end."""
        return self.average.module if self.average is not None and self.recipe.ema > 0 else self.net

    def deploy(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Give the net the averaged weights, where the recipe averages; with new statistics from these batches where
        averaging left the old ones wrong."""
        if self.swag is not None:
            self.swag.mean_to(self.net)
        elif self.average is not None:
            self.net.load_state_dict(self.average.module.state_dict())
        if self.swag is not None or self.recipe.swa_epochs:
            update_batch_norms(self.net, batches)
            parallel.average_(b for b in self.net.buffers() if b.is_floating_point())  # each process saw its own images
        parallel.broadcast_(self.net)  # one net to evaluate, whatever its statistics came from
        self.net.to(memory_format=torch.contiguous_format)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values. To be called by every process: each has a random state of its own."""
        cuda = self.device.type == "cuda"
        return {
            "net": self.net.state_dict(), "criterion": self.criterion.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "swag": self.swag.state_dict() if self.swag is not None else {},
            "rng": parallel.gather_objects(torch.get_rng_state()),
            "cuda_rng": parallel.gather_objects(torch.cuda.get_rng_state(self.device) if cuda else None),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.criterion.load_state_dict(state["criterion"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.swag is not None:
            self.swag.load_state_dict(state["swag"])
        torch.set_rng_state(state["rng"][parallel.rank()])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][parallel.rank()], self.device)


COLUMNS = "loss,loss_ce,loss_triplet,loss_center,val_mAP,lr,seconds"


def fit(
    net: ReIDNet,
    samples: Sequence[Sample],
    recipe: Recipe,
    run: Run,
    seed: int,
    device: str = "cpu",
    workers: int = 0,
    cache: str | None = None,
    held_out: Sequence[Sample] = (),
    report: Callable[[int, float], None] | None = None,
    prepare: Callable[[Learner], None] | None = None,
) -> Training:
    """Train ``net`` on ``samples`` by ``recipe``, in place; goes on from the run's checkpoint if there is one.
    ``cache``: a folder for decoded pictures. ``prepare`` is called before the first step, unless there is a checkpoint.

    ``held_out``: training identities that are not in ``samples``, to watch retrieval on: every ``recipe.eval_every``
    epochs and at the end; ``report`` is told each time (epoch from 1, mAP), and what it raises ends the training.

    After every epoch ``curves.csv`` and the checkpoint are written, and in mid-epoch when SIGTERM comes (then
    :class:`runs.Preempted` is raised). Order, crops and erasing are functions of (seed, epoch, batch), so an interrupted
    training ends in the same state as one that was not. With several processes (``autoreid.parallel``) each trains on
    its identities of every batch. Raises :class:`Diverged`.
    """
    share = recipe.identities // parallel.processes()
    require(recipe.gather or share >= 2 or recipe.triplet_weight == 0, "gather", "false", f"true where a process trains on "
            f"{share} identity of a batch: its triplets would have no negative")
    labels, identities = relabel(samples)
    sampler = PKSampler(labels, recipe.identities, recipe.images, seed)
    loader = TrainLoader(
        samples, labels, recipe.input, sampler, Augment.of(recipe), seed, workers, cache=cache,
        raw="cuda" in device,  # uint8 to the GPU, a quarter of the bytes, and finished there
        rank=parallel.rank(), processes=parallel.processes(),
    )
    watch = Watch(held_out, recipe.input, device) if held_out else None
    learner = Learner(net, identities, recipe, seed, device)
    run.open()
    first, start, seconds, memory, sums = 0, 0, 0.0, 0, torch.zeros(4, device=device)
    if (state := run.load()) is not None:
        learner.load(state)
        first, start, seconds, memory = state["epoch"], state["batch"], state["seconds"], state["memory"]
        sums = state["sums"][parallel.rank()].to(device)
        say(f"resumed after epoch {first}{f' and {start} batches' if start else ''} of {recipe.all_epochs}")
    else:
        if run.resumes:
            say("no epoch was finished: starting with the first")
        if prepare is not None:
            prepare(learner)
    val_map = None
    with closing(Curves(run.folder, COLUMNS, first)) as curves:
        for epoch, val_map in curves.read("val_mAP"):
            if report is not None and val_map is not None:
                report(epoch + 1, val_map)

        def state_at(epoch: int, batch: int) -> dict[str, Any]:
            return {**learner.state(), "epoch": epoch, "batch": batch, "sums": parallel.gather_objects(sums),
                    "seconds": seconds, "memory": memory}

        for epoch in range(first, recipe.all_epochs):
            begin = time.monotonic()
            rate = recipe.learning_rate(epoch)
            set_rate(learner.optimizer, rate, recipe.momentum_of(epoch))
            learner.module.train()
            done = start
            batches = progress(loader.epoch(epoch, start), len(loader) - start, f"epoch {epoch + 1}")
            while group := list(islice(batches, recipe.accumulate)):
                losses = learner.step([batch_on(device, batch, recipe.channels_last) for batch in group])
                sums = sums + losses * len(group)
                done += len(group)
                # On a GPU a look at the loss waits for it. What is not finite stays so in the sum.
                if (device == "cpu" or done % 10 == 0 or done == len(loader)) and not torch.isfinite(sums[0]):
                    raise Diverged(
                        f"training diverged in epoch {epoch + 1}: the loss is {losses[0].item()}; lower the learning "
                        f"rate, as in --set lr={recipe.lr / 4:g}"
                    )
                if asked_to_stop() and done < len(loader):
                    seconds += time.monotonic() - begin
                    run.save(state_at(epoch, done))
                    raise Preempted
            start, val_map = 0, None
            if watch is not None and recipe.eval_every and (epoch + 1) % recipe.eval_every == 0:
                try:
                    val_map = watch.mAP(learner.watched)
                except Preempted:
                    run.save(state_at(epoch, done))
                    raise
            learner.end_epoch(epoch)
            seconds += time.monotonic() - begin
            memory = max(memory, torch.cuda.max_memory_allocated(device) if "cuda" in device else peak_memory_bytes())
            parallel.average_([sums])
            means = (sums / len(loader)).tolist()
            curves.add(epoch, dict(zip(COLUMNS.split(","), (*means, val_map, rate, seconds), strict=True)))
            sums = torch.zeros(4, device=device)
            run.save(state_at(epoch + 1, 0))
            left = seconds / (epoch + 1) * (recipe.all_epochs - epoch - 1)
            shown = "" if val_map is None else f", val mAP {100 * val_map:.1f} %"
            losses_shown = f"ce {means[1]:.3f}, triplet {means[2]:.3f}"
            say(f"epoch {epoch + 1}/{recipe.all_epochs}: {losses_shown}{shown}, {left:.0f} s left")
            if report is not None and val_map is not None:
                report(epoch + 1, val_map)
            if asked_to_stop():
                raise Preempted
    learner.deploy(batch_on(device, batch) for batch in loader.epoch(recipe.all_epochs))
    if learner.swag is not None and parallel.is_first():
        swag = learner.swag
        moments = {"mean": swag.means, "variance": {name: swag.variance(name) for name in swag.means}}
        write_bytes(run.folder / "swag.safetensors", save({
            f"{moment}.{name}": value for moment, values in moments.items() for name, value in values.items()
        }))
    if watch is not None and (val_map is None or learner.average is not None or learner.swag is not None):
        val_map = watch.mAP(net)
        if report is not None:
            report(recipe.all_epochs, val_map)
    images_seen = recipe.all_epochs * len(loader) * recipe.identities * recipe.images
    return Training(
        recipe.all_epochs, seconds, images_seen / max(seconds, 1e-9), memory, device.split(":")[0], parallel.processes(),
        val_map,
    )


class Watch:
    """Retrieval on identities that are not trained on, as ``evaluate.held_out_split`` asks it."""

    def __init__(self, held_out: Sequence[Sample], size: tuple[int, int], device: str) -> None:
        self.query, self.gallery = held_out_split(held_out)
        require(bool(self.query), "held_out", f"{len(held_out)} images", "enough identities that one of them is seen by "
                "two cameras (or, without cameras, twice)")
        self.protocol = "plain" if without_cameras(held_out) else "market1501"
        self.size, self.device = size, device

    def mAP(self, net: nn.Module) -> float:
        parallel.broadcast_(net)  # each process has running statistics of its own images
        return evaluate(net, self.query, self.gallery, self.size, self.protocol, device=self.device).mAP


def batch_on(device: str, batch: Sequence[Tensor], channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """A loader's batch as the network's input and the labels, where the network is."""
    *pictures, labels = batch
    images = on_device(pictures, device)
    return images.to(memory_format=torch.channels_last) if channels_last else images, labels.to(device)


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
def embedding_of(net: ReIDNet) -> dict[str, Any]:
    """What is stored of one image: dimensions, type and bytes (an int8 gallery has 4 bytes of scale besides)."""
    dtype = "float32" if net.int8 is None else "int8"
    return {"dims": net.dims, "dtype": dtype, "bytes": bytes_of(net.dims, dtype)}


TESTED = ("query", "gallery")


def retrain(
    spec: ModelSpec,
    dataset: str,
    recipe: Recipe,
    out: str | Path,
    *,
    root: str | None = None,
    test: str | None = None,
    test_root: str | None = None,
    protocol: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    how: Evaluation = USUAL,
    init: str = "scratch",
    cache: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    name: str | None = None,
    group: str | None = None,
    prune: str | Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train a model on a dataset's training identities, evaluate it once, write the result.

    ``init``: "scratch", "imagenet" (torchvision's weights), a file of such weights or one of weights that this function
    wrote for the same model. ``test`` is another dataset to evaluate on, under ``test_root`` or else under ``root``;
    ``protocol`` another than the tested dataset's own. ``how`` to evaluate; where its views are 1, the recipe's count.
    ``cache``: a folder for decoded pictures.

    ``prune`` is the weights of the same model with more dimensions, that this function wrote: the training goes on from
    them and from their classifiers, with the ``spec.head["keep"]`` dimensions whose norm over the training set is largest
    (McDermott 2024, section 3, one step of iterative pruning). Their run's folder must still be beside them.

    Writes ``<out>/<test dataset>/[<group>/]<name>-s<seed>.json`` (the result), ``.safetensors`` (the weights) and a folder
    of the same name (configuration, curves, checkpoint). Returns the result's path and value.
    """
    name = name or spec.label + (f"-from-{folder_name(dataset)}" if test else "")
    folder = Path(out) / folder_name(test or dataset) / (group or "")
    target = folder / f"{name}-s{seed}.json"
    require(bool(re.fullmatch(r"[\w.-]+", name)), "name", name, "letters, digits, '.', '_' and '-'")
    run_folder, weights = folder / f"{name}-s{seed}", target.with_suffix(".safetensors")
    start = check_start(spec, recipe, init) if prune is None else start_of_pruning(spec, recipe, Path(prune), run_folder)
    # Names only: what the evaluation would find wrong with them is better found before the training.
    splits = data.load(dataset, root, parts=("train",) if test else data.PARTS)
    try:
        tested = data.load(test, test_root or root, parts=TESTED) if test else splits
    except UserError as fault:
        raise UserError(str(fault).replace("--root", "--test-root")) from None
    how = replace(how, views=recipe.views) if how.views == 1 else how
    rule, lines = check_task(tested.query, tested.gallery, protocol or tested.protocol, how)
    leaks = data.leaks(_side_by_side(splits, tested) if test else splits)
    for line in (*leaks, *lines):
        say(f"warning: {line}")
    samples, unreadable = (readable(splits.train) if how.skip_unreadable else (list(splits.train), []))
    for path in unreadable:
        say(f"left out, as it cannot be read: {path}")
    genotype = spec.genotype.key() if spec.genotype else None  # where it came from is not the question
    config = {
        "model": {**spec.to_dict(), "genotype": genotype}, "dataset": dataset, "recipe": asdict(recipe), "seed": seed,
        **start, "test": test, "protocol": protocol, "evaluation": how.to_dict(), "device": parallel.kind(device),
        "train_images": len(samples),
    }
    run = Run(run_folder, config, resume=resume, overwrite=overwrite, results=(target, weights))
    if run.finished:
        say(f"{target} is finished: nothing to resume")
        return target, read_json(target, "result")
    torch.manual_seed(seed)
    net = spec.build(recipe.drop_path)
    if wrote(init):
        load_same(net, init)
    elif init != "scratch":
        load_imagenet(net.backbone, spec.name, None if init == "imagenet" else init)
    trained, held_out = keep_out(samples, recipe.held_out, seed)
    pruning: dict[str, Any] = {} if prune is None else {"prepare": pruned_from(Path(prune), trained, recipe.input, device)}
    training = fit(net, trained, recipe, run, seed, device, workers, cache, held_out, **pruning)
    net.eval()
    # Also kept with the weights: an evaluation's result is to stand beside this one. The images are all that could be
    # read, also those that the recipe holds out: how many these are differs from seed to seed.
    origin = {
        "trained_on": splits.name, "train_part": splits.train_part, "train_images": len(samples),
        "train_unreadable": len(unreadable), "train_fingerprint": data.fingerprint(splits, ("train",)),
        "recipe": recipe.key(), "seed": seed, **start,
        # into how many a batch was cut whose statistics or losses were their own
        "batch_parts": 1 if recipe.sync_bn and recipe.gather else parallel.processes(),
    }
    if parallel.is_first():
        save_weights(
            weights, net, spec, input=list(recipe.input), mean=IMAGENET_MEAN, std=IMAGENET_STD,
            resize="bilinear, antialiased", dataset=dataset, recipe=recipe.key(), seed=seed, init=start["init"], name=name,
            origin=origin, epochs=recipe.all_epochs, leaks={data.fingerprint(tested, TESTED): leaks},
            held_out=sorted({s.identity for s in held_out}),  # who may set a threshold
        )
    try:
        result, _ = measure(net, spec, name, tested, recipe.input, device=device, how=how, protocol=rule.name)
    except UserError as fault:
        where = f"--dataset {test or dataset}" + (f" --root {shlex.quote(found)}" if (found := test_root or root) else "")
        raise UserError(
            f"{fault}; the training is done and its weights are saved: when this is mended go on with --resume, or "
            f"leave out what cannot be read by `autoreid evaluate {shlex.quote(str(weights))} {where} --skip-unreadable`"
        ) from fault
    result |= {"split": split_text(origin, tested), "warnings": [*leaks, *lines], **origin, "train": asdict(training),
               "environment": environment()}
    if parallel.is_first():
        write_json(target, result)
        write_json(run.summary, {"result": target.name, "mAP": result["mAP"]})
    parallel.wait()
    return target, result


def _side_by_side(splits: Splits, tested: Splits) -> Splits:
    """One dataset's training images beside another's test: a number they share says nothing, but a file would."""
    above = 1 + max(s.identity for s in (*tested.query, *tested.gallery))
    return replace(tested, train=tuple(s._replace(identity=s.identity + above) for s in splits.train))


def split_text(origin: Mapping[str, Any], tested: Splits) -> str:
    return f"{origin['train_images']} train, {len(tested.query)} query, {len(tested.gallery)} gallery images"


def again(weights: str | Path, metadata: Mapping[str, Any], tested: Splits) -> dict[str, Any]:
    """What the result of an evaluation says of the weights' training, in retrain's words, so that the two can be compared.

    Seconds and memory are not in the weights: they come from the result beside them, where there is one.
    """
    origin = metadata.get("origin") or {  # of weights written before they said more
        "trained_on": metadata["dataset"], **{key: metadata[key] for key in ("recipe", "seed", "init")}
    }
    name, train = metadata.get("name"), {"epochs": metadata["epochs"]} if "epochs" in metadata else None
    beside = Path(weights).with_suffix(".json")
    with suppress(UserError):
        there = read_json(beside, "result")
        if isinstance(there, dict) and all(there.get(key) == metadata[key] for key in ("recipe", "seed", "init")):
            name, train = name or there.get("model"), there.get("train") or train
    leaks = metadata.get("leaks", {}).get(data.fingerprint(tested, TESTED))  # of the same test lists
    return {
        **({"model": name} if name else {}), "split": split_text(origin, tested) if "train_images" in origin else None,
        "warnings": data.leaks(tested) if leaks is None else leaks, **origin, "train": train,
        "environment": environment(),
    }


def check_start(spec: ModelSpec, recipe: Recipe, init: str) -> dict[str, str]:
    """Find a picture size or weights that the network cannot take before anything is written. Returns what the result
    says of the start: ``init`` "scratch", or of a file its name and SHA-256 too."""
    cost.measure(spec.build, recipe.input)  # on the meta device
    if init == "scratch":
        return {"init": "scratch"}
    with torch.device("meta"):
        net = spec.build()
    if wrote(init):
        check_same(net, init)
        return start_of(Path(init), spec.name)
    return start_of(weights_file(net.backbone, spec.name, None if init == "imagenet" else init), spec.name)


# ---------------------------------------------------------------------------------------- one step of pruning
def start_of_pruning(spec: ModelSpec, recipe: Recipe, larger: Path, run_folder: Path) -> dict[str, Any]:
    """As :func:`check_start`, for a training that goes on from a larger embedding's. Raises UserError: weights of another
    model, or no more dimensions than are to be kept."""
    cost.measure(spec.build, recipe.input)
    config = run_folder / "config.json"
    if not larger.is_file() and (run_folder / "summary.json").is_file() and config.is_file():
        before = read_json(config, "run configuration")  # finished: what it began with may have been taken away
        return {key: before.get(key) for key in ("init", "init_file", "init_sha256", "init_epochs")}
    net, header = load_weights(larger)
    theirs, wanted = ModelSpec.from_dict(header["model"]), spec.head.get("keep")
    ours, other = (key_of([s.genotype.key() if s.genotype else s.name, s.backbone,
                           {k: v for k, v in s.head.items() if k != "keep"}]) for s in (spec, theirs))
    if wanted is None or ours != other:
        raise UserError(f"{larger} are the weights of {theirs.label}; a step of pruning to {spec.label} begins with those "
                        "of the same model with a larger keep, or with none")
    require(wanted < net.dims, "keep", wanted, f"1 to {net.dims - 1}: {larger} has embeddings of {net.dims} dimensions")
    before = header.get("origin", {}).get("init_epochs", 0)
    return {"init": "pruned", "init_file": larger.name, "init_sha256": sha256_of(larger),
            "init_epochs": before + header["epochs"]}


def pruned_from(weights: Path, samples: Sequence[Sample], size: tuple[int, int], device: str) -> Callable[[Learner], None]:
    """What gives a fresh learner the weights and classifiers of a larger embedding, cut to its largest dimensions."""

    def prepare(learner: Learner) -> None:
        folder = weights.with_suffix("")
        state = Run.saved(folder)
        if state is None:
            raise UserError(f"{folder} holds no checkpoint, and pruning goes on with the classifiers in it; train these "
                            "weights again")
        larger = load_weights(weights)[0].to(device)
        say(f"ranking {larger.dims} dimensions over {len(samples)} training images")
        widths = list(larger.branch_dims)
        parts = extract(_BeforeNecks(larger), samples, size, device).split(widths, dim=1)
        chosen = [largest_columns(x, dims) for x, dims in zip(parts, learner.net.branch_dims, strict=True)]
        learner.net.take_pruned(larger, chosen)
        learner.criterion.take_pruned(state["criterion"], chosen)

    return prepare


class _BeforeNecks(nn.Module):
    """A net whose output is all its branches' vectors before their necks, side by side: after a batch norm the norm of a
    dimension over the training set is that of its learned weight, whatever the features are."""

    def __init__(self, net: ReIDNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.net.before_necks(images), dim=1)


def measure(
    net: ReIDNet,
    spec: ModelSpec,
    name: str,
    tested: Splits,
    size: tuple[int, int],
    *,
    device: str = "cpu",
    how: Evaluation = USUAL,
    protocol: str | None = None,
) -> tuple[dict[str, Any], Extracted]:
    """A result's figures, cost and latency of the net and its retrieval metrics on the dataset's query and gallery; and
    what they are made of. Names the images left out."""
    protocol = protocol or tested.protocol
    say(f"evaluating {len(tested.query)} queries against {len(tested.gallery)} gallery images, {how.views} view(s) each")
    extracted = extract_both(net, tested.query, tested.gallery, size, protocol, device, how)
    for path in extracted.unreadable:
        say(f"left out, as it cannot be read: {path}")
    metrics = extracted.metrics()
    counted = cost.measure(spec.build, size)
    return {
        "model": name, "genotype": spec.genotype.key() if spec.genotype else None, "dataset": tested.name,
        "edition": tested.edition or None, "fingerprint": data.fingerprint(tested, TESTED), "protocol": protocol,
        "input": list(size), "params": counted.params, "macs": counted.macs,
        "embedding": embedding_of(net),
        **{key: value for key, value in metrics.to_dict().items() if key not in ("total", "scored", "protocol")},
        "queries": {"total": metrics.total, "scored": metrics.scored},
        "flip": how.views > 1, **how.to_dict(), "latency_ms": parallel.from_first(lambda: cost.latency(net, size, device)),
    }, extracted

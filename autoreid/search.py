"""The bilevel search with a retrieval loss: Auto-ReID (Quan et al., ICCV 2019, section 3.2, algorithm 1).

    while not converged:
        batch from D_train:  weights w  <-  lambda * cross-entropy + (1 - lambda) * batch-hard triplet     (eq. 5)
        batch from D_val:    alphas     <-  triplet                                                        (eq. 4)

D_train and D_val are two halves of the *training* identities; query and gallery are not even opened. What is easy to
get wrong is decided in :class:`SearchSettings` and in the step functions, each with its source.

With several processes (``autoreid.parallel``) each has its identities of every batch. Whatever is stepped with or read
is averaged over them first, so weights and alphas stay the same on all, bit for bit; GDAS' noise comes from generators
in one state, so all draw the same operations. Running statistics are each process's own: the first's are validated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoreid import parallel
from autoreid.data import Sample
from autoreid.errors import UserError, unknown
from autoreid.evaluate import evaluate, held_out_split, without_cameras
from autoreid.genotype import Genotype
from autoreid.loading import SPLITS, Augment, PKSampler, TrainLoader, relabel, split_for_search
from autoreid.losses import batch_hard_triplet
from autoreid.options import changed, read_json, require, require_ranges
from autoreid.runs import (
    Preempted,
    Run,
    asked_to_stop,
    peak_memory_bytes,
    progress,
    rows_up_to,
    say,
    write_json,
    write_text,
)
from autoreid.space import SearchSpace
from autoreid.supernet import KINDS, EdgeWeights, Supernet
from autoreid.tracking import Curves

ARCH_LOSSES = ("triplet", "retrieval", "ce")
Batch = tuple[Tensor, Tensor]  # images B x 3 x H x W, labels B


@dataclass(frozen=True)
class SearchSettings:
    """Every number of a search; the defaults are Auto-ReID's (section 4.1) where the paper gives one.

    Decisions where the paper is silent or contradicts itself:

    - ``arch_loss``: the text of section 3.2 updates the alphas by the triplet alone ("triplet"), its algorithm 1 by
      eq. 5 ("retrieval"); "ce" is the paper's baseline.
    - ``split``: the paper halves the images ("image"), so that both halves hold the same identities. "identity"
      keeps the halves' identities apart, as training and test are; the alphas then need a loss without classifier.
    - ``alpha_warmup`` epochs train the weights alone: early alphas favour operations without weights.
    - the weights step comes before the alphas step (algorithm 1; DARTS' code has them the other way round).
    - ``alpha_beta1`` .5 is DARTS'; ``clip`` 5 too (its training is unstable without; 0 means none).
    - ``tau`` falls linearly per epoch and reaches ``tau_min`` in the last one, as in the GDAS code.
    - ``identities`` x ``images``: the paper gives the batch, 16, and a class-balanced sampler, not its numbers.

    For several processes, whose batch together this is; one process reads neither:

    - ``sync_bn`` False: a batch norm sees its process's images only, as is usual. True makes the search that of one
      process, but for rounding, at two messages per norm and pass: a supernet has a norm for every operation.
    - ``gather`` True: triplets are formed in the whole batch; False: in each process's part.
    """

    method: str = "darts"
    channels: int = 32
    layers: tuple[int, ...] = (2, 2, 2, 2)
    stem: str = "pool"
    input: tuple[int, int] = (384, 128)
    identities: int = 4
    images: int = 4
    epochs: int = 200
    alpha_warmup: int = 10
    split: str = "identity"
    arch_loss: str = "triplet"
    ce_weight: float = 0.5
    margin: float = 0.3
    dropout: float = 0.5
    embedding_dim: int | None = None
    lr: float = 0.1
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    alpha_lr: float = 0.02
    alpha_milestones: tuple[int, ...] = (60, 150)
    alpha_gamma: float = 0.1
    alpha_beta1: float = 0.5
    alpha_weight_decay: float = 5e-4
    tau_max: float = 10.0
    tau_min: float = 0.1
    gdas_gradient: str = "sampled"
    flip: float = 0.5
    pad: int = 10
    erase: float = 0.0
    eval_every: int = 1
    sync_bn: bool = field(default=False, metadata={"later": True})
    gather: bool = field(default=True, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        for name, allowed in (("arch_loss", ARCH_LOSSES), ("split", SPLITS), ("gdas_gradient", ("sampled", "all"))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.split == "identity" and self.arch_loss != "triplet":
            raise UserError(
                f"arch_loss={self.arch_loss} with split=identity: the classifier knows no identity of the validation "
                "half; add --set split=image, or use arch_loss=triplet"
            )
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(0 <= self.alpha_warmup < self.epochs, "alpha_warmup", self.alpha_warmup, f"0 to {self.epochs - 1}, "
                "below epochs, or the alphas would never be updated")
        require(len(self.input) == 2 and min(self.input) >= 16, "input", "x".join(map(str, self.input)),
                "HxW with both sides at least 16, as in 128x64")
        require_ranges(
            self, channels=(2, 4096, "2 or more"), ce_weight=(0, 1, "from 0 to 1 (lambda of eq. 5)"),
            margin=(0, 1e6, "0 or more"), dropout=(0, 0.99, "from 0 to .99"), embedding_dim=(1, 1e6, "1 or more, or none"),
            lr=(1e-12, 1e6, "above 0"), lr_min=(0, self.lr, "from 0 to lr"), momentum=(0, 0.9999, "from 0 to below 1"),
            weight_decay=(0, 1e6, "0 or more"), clip=(0, 1e12, "0 (no clipping) or more"),
            alpha_lr=(1e-12, 1e6, "above 0"), alpha_gamma=(0, 1, "from 0 to 1"),
            alpha_beta1=(0, 0.9999, "from 0 to below 1"), alpha_weight_decay=(0, 1e6, "0 or more"),
            flip=(0, 1, "from 0 to 1"), erase=(0, 1, "from 0 to 1"), pad=(0, 4096, "0 or more pixels"),
            eval_every=(1, 1e9, "1 or more (epochs between validations)"),
        )
        require(len(self.layers) >= 2 and min(self.layers) >= 1, "layers", list(self.layers),
                "two stages or more, each with a cell: without a second stage there is no reduction cell")
        require(self.identities >= 2 and self.images >= 2, "identities, images", (self.identities, self.images),
                "2 or more each: a triplet needs a positive and a negative")
        require(self.tau_max >= self.tau_min > 0, "tau_max, tau_min", (self.tau_max, self.tau_min),
                "tau_max >= tau_min > 0")


# ---------------------------------------------------------------------------------------- the two halves' data
@dataclass(frozen=True)
class SearchData:
    """Batches of both halves and the retrieval task on the validation half."""

    train: TrainLoader
    val: TrainLoader
    classes: int  # identities of the weights' half: what the classifier tells apart
    train_images: int
    val_images: int
    query: Sequence[Sample]
    gallery: Sequence[Sample]
    protocol: str


def search_data(
    samples: Sequence[Sample], settings: SearchSettings, seed: int, workers: int = 0, cache: str | None = None
) -> SearchData:
    """Split the training samples in two (algorithm 1, line 1) and make a class-balanced loader of each half."""
    processes = parallel.processes()
    require(settings.gather or settings.identities >= 2 * processes, "identities", settings.identities,
            f"{2 * processes} or more for {processes} processes with gather=false: a triplet needs a negative")
    train, val = split_for_search(samples, settings.split, seed)
    labels, identities = relabel(train)
    if settings.split == "image":  # the same identities on both sides: one numbering, so that the classifier fits
        number = {sample.identity: label for sample, label in zip(train, labels, strict=True)}
        val = [sample for sample in val if sample.identity in number]
        val_labels = [number[sample.identity] for sample in val]
    else:
        val_labels, _ = relabel(val)
    augment = Augment(settings.flip, settings.pad, settings.erase)

    def loader(half: Sequence[Sample], half_labels: Sequence[int], salt: int) -> TrainLoader:
        sampler = PKSampler(half_labels, settings.identities, settings.images, seed=seed * 2 + salt)
        return TrainLoader(half, half_labels, settings.input, sampler, augment, seed * 2 + salt, workers, cache=cache,
                           rank=parallel.rank(), processes=processes)

    query, gallery = held_out_split(val)
    if not query:
        raise UserError(
            "no identity of the validation half is seen by two cameras, so retrieval cannot be validated: check the "
            "camera numbers with `autoreid data`, or add identities"
        )
    protocol = "plain" if without_cameras(val) else "market1501"
    return SearchData(
        loader(train, labels, 0), loader(val, val_labels, 1), identities, len(train), len(val), query, gallery, protocol
    )


def endless(loader: TrainLoader, step: int) -> Iterator[Batch]:
    """The loader's batches from global step ``step`` on, epoch after epoch."""
    while True:
        epoch, start = divmod(step, len(loader))
        for batch in loader.epoch(epoch, start):
            step += 1
            yield batch


# ---------------------------------------------------------------------------------------- the state of a search
class Searcher:
    """The supernet, its classifier, both optimisers and the generator of GDAS' noise: all that a checkpoint holds."""

    def __init__(self, space: SearchSpace, settings: SearchSettings, identities: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.settings, self.device = settings, torch.device(device)
        self.net = Supernet(space, settings.channels, settings.layers, settings.stem).to(device)
        width = settings.embedding_dim or self.net.dims
        embedding: list[nn.Module] = []
        if settings.embedding_dim is not None:
            embedding = [nn.Linear(self.net.dims, width), nn.Dropout(settings.dropout)]
        self.classifier = nn.Sequential(  # f -> (g) -> h with dropout between, section 3.2
            nn.Dropout(settings.dropout), *embedding, nn.Linear(width, identities)
        ).to(device)
        if settings.sync_bn and parallel.processes() > 1:
            parallel.synchronised(self.net, device)
        parallel.broadcast_(self.net)
        parallel.broadcast_(self.classifier)
        self.weights = [*self.net.weight_parameters(), *self.classifier.parameters()]
        self.weight_optimizer = torch.optim.SGD(
            self.weights, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.net.arch_parameters(), settings.alpha_lr, betas=(settings.alpha_beta1, 0.999),
            weight_decay=settings.alpha_weight_decay,
        )
        self.generator = torch.Generator().manual_seed(seed + 1)  # GDAS': the same on all processes
        self.tau = settings.tau_max
        if parallel.processes() > 1:
            torch.manual_seed(seed + 10_007 * parallel.rank())  # each process drops other units

    def schedule(self, epoch: int) -> None:
        """Set the learning rates and the temperature of ``epoch`` (from 0): functions of the epoch, no state."""
        s = self.settings
        fraction = epoch / max(s.epochs - 1, 1)  # 1 in the last epoch, so that every end value is reached
        cosine = s.lr_min + (s.lr - s.lr_min) * (1 + math.cos(math.pi * fraction)) / 2
        step = s.alpha_lr * s.alpha_gamma ** sum(epoch >= milestone for milestone in s.alpha_milestones)
        self.weight_optimizer.param_groups[0]["lr"] = cosine
        self.alpha_optimizer.param_groups[0]["lr"] = step
        self.tau = s.tau_max - (s.tau_max - s.tau_min) * fraction

    def edge_weights(self, detach: bool = False) -> EdgeWeights:
        """The weights of every edge for one forward pass, a new draw each time with GDAS."""
        if METHODS[self.settings.method].sampled:
            return self.net.sample(self.tau, self.generator, self.settings.gdas_gradient, detach)
        return self.net.softmax_weights(detach)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values. To be called by every process: each has a random state of its own."""
        cuda = self.device.type == "cuda"
        return {
            "net": self.net.state_dict(), "classifier": self.classifier.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": self.generator.get_state(), "rng": parallel.gather_objects(torch.get_rng_state()),
            "cuda_rng": parallel.gather_objects(torch.cuda.get_rng_state(self.device) if cuda else None),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.classifier.load_state_dict(state["classifier"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"][parallel.rank()])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][parallel.rank()], self.device)


# ---------------------------------------------------------------------------------------- losses and steps
def retrieval_loss(searcher: Searcher, batch: Batch, edges: EdgeWeights) -> tuple[Tensor, ...]:
    """Eq. 5 and its two terms on one batch: (lambda * L_s + (1 - lambda) * L_t, L_s, L_t).

    Of several processes L_s is each one's own: the mean over processes is that of the whole batch.
    """
    images, labels = (part.to(searcher.device, non_blocking=True) for part in batch)
    features = searcher.net(images, edges)  # f, B x dims
    ce = nn.functional.cross_entropy(searcher.classifier(features), labels)
    triplet = triplet_loss(searcher, features, labels)
    lam = searcher.settings.ce_weight
    return lam * ce + (1 - lam) * triplet, ce, triplet


def triplet_loss(searcher: Searcher, features: Tensor, labels: Tensor) -> Tensor:
    """Of all processes' features together, unless ``gather`` is off."""
    if searcher.settings.gather:
        features, labels = parallel.gather(features), parallel.gather(labels)
    return batch_hard_triplet(features, labels, searcher.settings.margin)


def architecture_loss(searcher: Searcher, batch: Batch) -> Tensor:
    """What the alphas minimise on a validation batch: see ``arch_loss`` of the settings."""
    edges = searcher.edge_weights()
    if searcher.settings.arch_loss == "triplet":  # no classifier: the identities may be new to it
        images, labels = (part.to(searcher.device, non_blocking=True) for part in batch)
        return triplet_loss(searcher, searcher.net(images, edges), labels)
    loss, ce, _ = retrieval_loss(searcher, batch, edges)
    return ce if searcher.settings.arch_loss == "ce" else loss


def weight_step(searcher: Searcher, batch: Batch) -> tuple[float, float]:
    """One SGD step on w; returns (cross-entropy, triplet). The gradients are None again when it ends."""
    losses = retrieval_loss(searcher, batch, searcher.edge_weights(detach=True))
    losses[0].backward()
    means = torch.stack(losses).detach()
    parallel.average_([means, *(w.grad for w in searcher.weights)])
    loss, ce, triplet = means.tolist()
    if not math.isfinite(loss):  # after the average: on every process or on none
        raise UserError(
            f"the search diverged: the training loss is {loss}; lower the learning rate, as in "
            f"--set lr={searcher.settings.lr / 4:g}"
        )
    if searcher.settings.clip > 0:
        nn.utils.clip_grad_norm_(searcher.weights, searcher.settings.clip)
    # operations that GDAS did not draw have no gradient at all, so momentum and decay leave them alone too
    searcher.weight_optimizer.step()
    searcher.weight_optimizer.zero_grad(set_to_none=True)
    return ce, triplet


def arch_step(searcher: Searcher, train: Batch, val: Batch) -> float:
    """One Adam step on the alphas; returns the validation loss. No weight gets a gradient, by construction, and the
    batch norms' running statistics see no validation picture."""
    with statistics_untouched(searcher.net):
        loss, found = METHODS[searcher.settings.method].arch_gradient(searcher, train, val)
    parallel.average_([loss, *found])
    for alpha, gradient in zip(searcher.net.arch_parameters(), found, strict=True):
        alpha.grad = gradient
    searcher.alpha_optimizer.step()
    searcher.alpha_optimizer.zero_grad(set_to_none=True)
    return loss.item()


@contextmanager
def statistics_untouched(net: nn.Module) -> Iterator[None]:
    """Batch norms normalise by their batch as in training, without moving their running statistics."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def first_order(searcher: Searcher, train: Batch | None, val: Batch) -> tuple[Tensor, Sequence[Tensor]]:
    """dL_val(w, alpha) / dalpha (DARTS, section 2.3 with xi = 0; what Auto-ReID used). ``train`` is not read. As of all
    methods, loss and gradients are this process's, to be averaged."""
    loss = architecture_loss(searcher, val)
    return loss.detach(), gradients(loss, searcher.net.arch_parameters())


def gradients(loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """dloss / dparameters; zeros where the loss does not read one (a triplet and the classifier, or a GDAS draw of
    ``none`` on every edge of a kind of cell)."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def second_order(searcher: Searcher, train: Batch, val: Batch, epsilon: float = 0.01) -> tuple[Tensor, Sequence[Tensor]]:
    """dL_val(w', alpha) / dalpha with w' one training step ahead (DARTS, eq. 6-8).

    w' = w - eta (mu * buffer + dL_train/dw + decay * w), the step SGD would take at its current rate, without
    clipping. The Hessian-vector product is a central difference: with g = dL_val/dw' and R = epsilon / |g|,
    d2L_train/(dalpha dw) g = (dL_train(w + R g)/dalpha - dL_train(w - R g)/dalpha) / 2R.

    Of several processes w' and g are the averages over all, so that all look from the same w' along the same g; the rest
    is linear in each one's gradients and averaged with them (arch_step).

    The three training passes replay the same dropout and leave no trace: weights and random state are put back from
    copies (adding and subtracting R g would leave rounding behind), running statistics are untouched (arch_step).
    """
    weights, alphas = searcher.weights, searcher.net.arch_parameters()
    group = searcher.weight_optimizer.param_groups[0]
    eta, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
    saved = [w.detach().clone() for w in weights]
    devices = [searcher.device] if searcher.device.type == "cuda" else []
    rng = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    def training_loss() -> Tensor:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(rng[0])
            for device, state in zip(devices, rng[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            return retrieval_loss(searcher, train, searcher.edge_weights())[0]

    def put_back(offset: float, direction: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for w, old, d in zip(weights, saved, direction, strict=True):
                w.copy_(old + offset * d)

    # w': the step ahead
    slope = gradients(training_loss(), weights)
    parallel.average_(slope)
    ahead = [g + decay * w.detach() for g, w in zip(slope, weights, strict=True)]
    for d, w in zip(ahead, weights, strict=True):
        momentum = searcher.weight_optimizer.state.get(w, {}).get("momentum_buffer")
        if momentum is not None:
            d.add_(momentum, alpha=mu)
    put_back(-eta, ahead)

    # the validation loss there, and its gradients over alpha and w'
    loss = architecture_loss(searcher, val)
    direct = gradients(loss, alphas, retain_graph=True)
    g = gradients(loss, weights)
    parallel.average_(g)

    # the Hessian-vector product by a central difference around w
    norm = math.sqrt(sum(d.double().square().sum().item() for d in g))
    r = epsilon / max(norm, 1e-12)
    put_back(r, g)
    plus = gradients(training_loss(), alphas)
    put_back(-r, g)
    minus = gradients(training_loss(), alphas)

    put_back(0.0, g)
    return loss.detach(), [d - eta * (p - m) / (2 * r) for d, p, m in zip(direct, plus, minus, strict=True)]


@dataclass(frozen=True)
class Method:
    """Whether edges are sampled, and how the alphas' gradient is taken."""

    sampled: bool
    arch_gradient: Callable[..., tuple[Tensor, Sequence[Tensor]]]


METHODS: dict[str, Method] = {
    "darts": Method(sampled=False, arch_gradient=first_order),
    "darts-2": Method(sampled=False, arch_gradient=second_order),
    "gdas": Method(sampled=True, arch_gradient=first_order),
}

# Settings by name. "default" is the paper's with the halves' identities apart and an alpha warm-up. "drawn" is for the
# drawn data on two CPU cores: small pictures, few channels, one cell per stage (depthwise convolutions are slow there).
PRESETS: dict[str, SearchSettings] = {
    "default": SearchSettings(),
    "autoreid-iccv19": SearchSettings(split="image", alpha_warmup=0),
    "drawn": SearchSettings(
        channels=8, layers=(1, 1, 1), stem="half", input=(64, 32), identities=8, images=4, epochs=14, alpha_warmup=3,
        lr=0.05, alpha_milestones=(), pad=4, dropout=0.0,
    ),
}
PRESETS["demo"] = replace(PRESETS["drawn"], epochs=8, alpha_warmup=2)


def find_settings(preset: str, changes: dict[str, Any]) -> SearchSettings:
    """A preset by name, with ``changes`` applied."""
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return changed(PRESETS[preset], changes, "search settings", ("alpha_warmup", "alpha_milestones"))


# ---------------------------------------------------------------------------------------- the loop
COLUMNS = ("loss_ce,loss_triplet,loss_alpha,val_mAP,val_rank1,entropy_normal,entropy_reduction,tau,lr,seconds,"
           "memory_bytes")


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost."""

    genotype: Genotype
    val_mAP: float
    device_hours: float
    peak_memory_bytes: int

    @classmethod
    def read(cls, run: Run) -> SearchResult:
        """The result of a finished run."""
        summary = read_json(run.summary, "summary")
        return cls(
            Genotype.load(run.folder / "genotype.json"), summary["val_mAP"], summary["device_hours"],
            summary["peak_memory_bytes"],
        )


def entropy(weights: Tensor) -> float:
    """Mean entropy of the edges' softmax in nats: log(operations) at the start, 0 when every edge has decided."""
    return float(-(weights * weights.clamp_min(1e-12).log()).sum(dim=1).mean())


def search(
    space: SearchSpace,
    samples: Sequence[Sample],
    settings: SearchSettings,
    run: Run,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    provenance: dict[str, Any] | None = None,
    cache: str | None = None,
) -> SearchResult:
    """Search ``space`` on training ``samples`` and record it in ``run``; goes on from the run's checkpoint if any.

    Written after every epoch: ``curves.csv`` (losses, validation mAP, entropies, tau, seconds, memory), ``alphas.csv``
    (every edge's softmax), ``genotype.json`` (the genotype of the moment) and the checkpoint, which is written in
    mid-epoch too when SIGTERM comes (then :class:`runs.Preempted` is raised). Of several processes the first writes;
    ``device_hours`` count all. ``cache``: a folder for decoded pictures.
    """
    if run.finished:
        say(f"{run.folder} is finished: nothing to resume")
        return SearchResult.read(run)
    data = search_data(samples, settings, seed, workers, cache)
    searcher = Searcher(space, settings, data.classes, seed, device)
    run.open()
    first, start, sums, seconds, memory, steps = 0, 0, [0.0, 0.0, 0.0], 0.0, 0, len(data.train)
    if (state := run.load()) is not None:
        searcher.load(state["searcher"])
        first, start, sums, seconds, memory = (state[k] for k in ("epoch", "batch", "sums", "seconds", "memory"))
        say(f"resumed after epoch {first}{f' and {start} batches' if start else ''} of {settings.epochs}")
    elif run.resumes:
        say("no epoch was finished: starting with the first")
    curves, trajectories = Curves(run.folder, COLUMNS, first), run.folder / "alphas.csv"
    alphas = rows_up_to(trajectories, first) or ["epoch,cell,edge,operation,weight"]

    def save(epoch: int, batch: int) -> None:
        run.save({
            "searcher": searcher.state(), "epoch": epoch, "batch": batch, "sums": sums, "seconds": seconds,
            "memory": memory,
        })

    def write_genotype(epoch: int) -> Genotype:
        genotype = searcher.net.derive(**(provenance or {}), macro=macro(settings), epoch=epoch)
        if parallel.is_first():
            write_text(run.folder / "genotype.json", genotype.to_json())
        return genotype

    val_map: float | None = None
    for epoch in range(first, settings.epochs):
        begin = time.monotonic()
        searcher.schedule(epoch)
        start, sums = run_epoch(searcher, data, epoch, start, sums)
        val_map = rank1 = None
        try:
            if start < steps:
                raise Preempted
            if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs:
                val_map, rank1 = validate(searcher, data)
        except Preempted:
            seconds += time.monotonic() - begin
            save(epoch, start)  # in the validation: after the epoch's last batch
            raise
        seconds += time.monotonic() - begin
        memory = max(memory, memory_bytes(searcher.device))
        ce, triplet, alpha_loss = (total / steps for total in sums)
        softmax = {kind: w.detach().cpu() for kind, w in searcher.net.softmax_weights().items()}
        curves.add(epoch, dict(zip(COLUMNS.split(","), (
            ce, triplet, alpha_loss if epoch >= settings.alpha_warmup else None, val_map, rank1,
            *(entropy(softmax[kind]) for kind in KINDS), searcher.tau, searcher.weight_optimizer.param_groups[0]["lr"],
            seconds, memory,
        ), strict=True)))
        alphas.extend(
            f"{epoch},{kind},{source}->{node},{operation},{weight:.6g}"
            for kind in KINDS
            for (node, source), row in zip(space.edges, softmax[kind].tolist(), strict=True)
            for operation, weight in zip(space.operations, row, strict=True)
        )
        if parallel.is_first():
            write_text(trajectories, "\n".join(alphas) + "\n")
        write_genotype(epoch + 1)
        start, sums = 0, [0.0, 0.0, 0.0]
        save(epoch + 1, 0)
        left = seconds / (epoch + 1) * (settings.epochs - epoch - 1)
        shown = "" if val_map is None else f", val mAP {100 * val_map:.1f} %"
        say(f"epoch {epoch + 1}/{settings.epochs}: ce {ce:.3f}, triplet {triplet:.3f}{shown}, {left:.0f} s left")
        if asked_to_stop():
            raise Preempted
    curves.close()
    # a run resumed after its last epoch lacks only the closing files
    final_map = validate(searcher, data)[0] if val_map is None else val_map
    genotype = write_genotype(settings.epochs)
    result = SearchResult(genotype, final_map, seconds / 3600 * parallel.processes(), memory)
    if parallel.is_first():
        write_json(run.summary, {
            "genotype": genotype.key(), "val_mAP": final_map, "device_hours": result.device_hours, "device": device,
            "processes": parallel.processes(), "peak_memory_bytes": result.peak_memory_bytes,
            "steps": settings.epochs * steps, "split": {"train": data.train_images, "val": data.val_images},
            "settings": asdict(settings),
        })
    parallel.wait()  # the summary is there for whoever reads it next
    return result


def search_config(
    dataset: str, space: SearchSpace, settings: SearchSettings, seed: int, device: str, images: int
) -> dict[str, Any]:
    """What a search is asked: a run can only be resumed with the same. Settings that older runs do not have enter only
    where they differ from their defaults."""
    asked = {f.name: getattr(settings, f.name) for f in fields(settings)
             if not ("later" in f.metadata and getattr(settings, f.name) == f.default)}
    return {
        "dataset": dataset, "space": asdict(space), "settings": asked, "seed": seed, "device": device,
        "train_images": images,
    }


def macro(settings: SearchSettings) -> dict[str, Any]:
    """The derived network's size unless the user asks for another: the searched one's, twice as wide (paper: 32, 64)."""
    return {"channels": 2 * settings.channels, "layers": list(settings.layers), "stem": settings.stem}


def run_epoch(
    searcher: Searcher, data: SearchData, epoch: int, start: int = 0, sums: Sequence[float] = (0.0, 0.0, 0.0)
) -> tuple[int, list[float]]:
    """Algorithm 1's loop over the batches of one epoch, from batch ``start`` on. Returns how many are done, fewer than
    there are when SIGTERM came, and the sums over them (``sums`` included) of cross-entropy, triplet and alpha loss."""
    searcher.net.train()
    searcher.classifier.train()
    steps, done, totals = len(data.train), start, list(sums)
    update_alphas = epoch >= searcher.settings.alpha_warmup
    seen = (epoch - searcher.settings.alpha_warmup) * steps + start  # a validation batch for each, since the warm-up
    validation = endless(data.val, seen) if update_alphas else None
    for train in progress(data.train.epoch(epoch, start), steps - start, f"search epoch {epoch + 1}"):
        ce, triplet = weight_step(searcher, train)
        alpha = arch_step(searcher, train, next(validation)) if validation is not None else 0.0
        totals = [total + value for total, value in zip(totals, (ce, triplet, alpha), strict=True)]
        done += 1
        if done < steps and asked_to_stop():
            break
    return done, totals


def validate(searcher: Searcher, data: SearchData) -> tuple[float, float]:
    """mAP and rank-1 of the supernet on the validation half.

    The weights have never seen it, the alphas have: this figure watches the search, it does not say how good the
    derived network will be. GDAS is measured as the path it would derive, DARTS as its mixture.
    """
    parallel.broadcast_(searcher.net)  # each process has running statistics of its own images
    sampled = METHODS[searcher.settings.method].sampled
    edges = searcher.net.derived_weights() if sampled else searcher.net.softmax_weights(detach=True)
    net = _WithEdges(searcher.net, edges)
    metrics = evaluate(net, data.query, data.gallery, searcher.settings.input, data.protocol, device=str(searcher.device))
    return metrics.mAP, metrics.cmc[1]


class _WithEdges(nn.Module):
    """The supernet with its edges' weights fixed, as a net from images to features."""

    def __init__(self, net: Supernet, edges: EdgeWeights) -> None:
        super().__init__()
        self.net, self.edges = net, edges

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images, self.edges)


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the CUDA allocator on a GPU, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()

"""What test_parallel.py asks of processes that torchrun joined: ``parallel_checks.py FOLDER [CHECK]`` writes what each
check found to FOLDER/<check>-<rank>.pt. Also called by the test itself, alone, for what one process finds."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from autoreid import data, parallel
from autoreid.evaluate import extract, extract_readable
from autoreid.loading import Augment, PKSampler, TrainLoader, relabel
from autoreid.network import find_model
from autoreid.recipe import Recipe
from autoreid.runs import Run
from autoreid.train import Learner, batch_on, fit

RECIPE = Recipe(input=(32, 16), optimizer="sgd", lr=0.02, momentum=0.9, epochs=2, warmup_epochs=0, identities=4, images=3,
                pad=2, erase=0.2, center_weight=0.01, sync_bn=True, clip=1.0)
MODEL = {"width": 4, "stem": 3}


def part(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(parallel.processes())[parallel.rank()]


def messages(folder: Path) -> dict:
    """Every small function, with values that differ by rank."""
    r, found = parallel.rank(), {}
    found["objects"] = parallel.gather_objects({"rank": r, "x": torch.arange(r + 1)})
    found["agree"] = [parallel.agree(r == 1), parallel.agree(False)]
    found["from_first"] = parallel.from_first(lambda: f"made by {parallel.rank()}")
    try:
        parallel.from_first(lambda: 1 / 0)
    except ZeroDivisionError as fault:
        found["raised"] = str(fault)
    tensors = [torch.full((2, 2), float(r)), None, torch.full((3,), 2.0 * r, dtype=torch.float64)]
    parallel.average_(tensors)
    found["average"] = tensors
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, r + 5)
    parallel.broadcast_(net)
    found["broadcast"] = net.weight.detach()
    return found


def gathered(folder: Path) -> dict:
    """The gradient of a loss of all rows, through rows of each process, averaged as DDP does."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    rows = parallel.gather(part(x) @ weight)
    torch.cdist(rows, rows).pow(3).sum().backward()
    parallel.average_([weight.grad])
    return {"rows": rows.detach(), "gradient": weight.grad}


def batch_norms(folder: Path) -> dict:
    """Output, gradients and running statistics of batch norms over all processes' rows, twice in training, once not."""
    found = {}
    for name, norm, shape in (("2d", nn.BatchNorm2d(3), (4, 3, 5, 2)), ("1d", nn.BatchNorm1d(3, momentum=None), (4, 3)),
                              ("plain", nn.BatchNorm2d(3, affine=False, track_running_stats=False), (4, 3, 2, 2))):
        torch.manual_seed(1)
        if norm.affine:
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm = parallel.synchronised(norm).double()
        outs, x = [], (5 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        for _ in range(2):
            outs.append(parallel.gather(norm(part(x))))
        norm.eval()
        outs.append(parallel.gather(norm(part(x))) if norm.track_running_stats else outs[0])
        loss = sum((out * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()).sum() for out in outs)
        loss.backward()
        gradients = [x.grad, *(p.grad for p in norm.parameters())]
        parallel.average_(gradients)
        found[name] = [out.detach() for out in outs], gradients, dict(norm.state_dict())
    return found


def steps(folder: Path) -> dict:
    """The gradients of the first step and the weights after ten, by the recipe's losses of the global batch."""
    samples = data.load("market", str(folder / "market"), parts=("train",)).train
    labels, identities = relabel(samples)
    found = {}
    for name, changes in (("plain", {}), ("accumulated", {"accumulate": 2}), ("ema", {"ema": 0.5, "optimizer": "adam",
                                                                                      "lr": 1e-3})):
        recipe = replace(RECIPE, **changes)
        torch.manual_seed(0)
        learner = Learner(find_model("resnet18", MODEL).build(), identities, recipe, 0, "cpu")
        loader = TrainLoader(samples, labels, recipe.input, PKSampler(labels, 4, 3, 0), Augment.of(recipe), 0,
                             rank=parallel.rank(), processes=parallel.processes())
        batches = [batch for epoch in range(20) for batch in loader.epoch(epoch)]
        learner.module.train()
        taken, size = [], recipe.accumulate
        for number in range(10):
            taken.append(learner.step([batch_on("cpu", b) for b in batches[number * size : (number + 1) * size]]))
            if number == 0:
                found[f"{name} gradients"] = {n: p.grad.clone() for n, p in learner.net.named_parameters()
                                              if p.grad is not None}
                found[f"{name} centers"] = [p.grad.clone() for p in learner.criterion.parameters() if p.grad is not None]
        found[name] = {n: v.clone() for n, v in learner.watched.state_dict().items()}
        found[f"{name} losses"] = torch.stack(taken)
    return found


def features(folder: Path) -> dict:
    """Features of pictures and of tracklets, batches of 3; some pictures cannot be read."""
    splits = data.load("market", str(folder / "market"))
    torch.manual_seed(0)
    net = find_model("resnet18", MODEL).build()
    samples = list(splits.gallery)
    tracklets = [samples[0]._replace(frames=tuple(s.path for s in samples[:7])) if hasattr(samples[0], "_replace")
                 else samples[0]]
    broken = [*samples[:4], type(samples[0])(str(folder / "broken.jpg"), 1, 1), *samples[4:9]]
    left, kept, bad = extract_readable(net, broken, (32, 16), batch=3)
    return {"pictures": extract(net, samples, (32, 16), batch=3, views=2),
            "tracklets": extract(net, tracklets, (32, 16), batch=3), "readable": left, "kept": len(kept), "bad": len(bad)}


def training(folder: Path) -> dict:
    """A whole training with its own statistics on each process, dropout, SWA and a held-out evaluation."""
    samples = data.load("market", str(folder / "market"), parts=("train",)).train
    identities = sorted({s.identity for s in samples})
    held = [s for s in samples if s.identity in identities[:3]]
    recipe = replace(RECIPE, sync_bn=False, classifier_dropout=0.5, swa_epochs=1, held_out=0.3, eval_every=1)
    torch.manual_seed(0)
    net = find_model("resnet18", MODEL).build()
    run = Run(folder / f"run{parallel.processes()}", {}, resume=False, overwrite=True)
    told: list = []
    trained = fit(net, [s for s in samples if s not in held], recipe, run, 0, held_out=held,
                  report=lambda *figures: told.append(figures))
    return {"net": net.state_dict(), "told": told, "val_mAP": trained.val_mAP, "processes": trained.processes}


CHECKS = (messages, gathered, batch_norms, steps, features, training)


def main() -> None:
    parallel.start("cpu")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for check in CHECKS:
        torch.manual_seed(0)
        torch.save(check(folder), folder / f"{check.__name__}-{parallel.rank()}.pt")
    parallel.end()


if __name__ == "__main__":
    main()

"""What test_search_parallel.py asks of processes that torchrun joined:

``search_checks.py checks FOLDER`` writes what each check found to FOLDER/<check>-<rank>.pt, then searches in FOLDER/whole
and, until process 1 gets a SIGTERM in the seventh step, in FOLDER/stopped;
``search_checks.py later FOLDER`` goes on with FOLDER/stopped, then searches in FOLDER/failed, where process 1 raises a
UserError in the seventh step.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

import autoreid.search
from autoreid import data, parallel
from autoreid.errors import UserError
from autoreid.runs import Preempted, Run, heeding_sigterm
from autoreid.search import Searcher, SearchSettings, arch_step, search, search_data, validate, weight_step
from autoreid.space import SearchSpace

SPACE = SearchSpace("small", ("none", "part_aware", "sep_conv_3x3", "avg_pool_3x3"), nodes=1, parts=2)
SETTINGS = SearchSettings(
    channels=4, layers=(1, 1), stem="half", input=(32, 16), identities=4, images=3, epochs=3, alpha_warmup=1, lr=0.05,
    alpha_milestones=(), pad=2, dropout=0.0, sync_bn=True,
)  # fmt: skip
# At lr .05 ten steps of one process in float32 stray from the same in float64 by up to 1e-3 (a hardest triplet or a ReLU
# switches, and Adam divides rounding by itself), at .01 by 1e-6; in float64 any rate shows the equality.
VARIANTS = (("darts", torch.float, 0.01), ("darts-2", torch.float, 0.01), ("gdas", torch.float, 0.01),
            ("darts-2", torch.double, 0.05), ("gdas", torch.double, 0.05))
STEPS = {torch.float: 10, torch.double: 3}


def part(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(parallel.processes())[parallel.rank()]


def batch(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's half of a batch of 4 x 3 images, the identities different in mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(3)
    images = torch.randn(12, 3, 32, 16, generator=generator, dtype=torch.double)
    images += torch.randn(4, 3, 1, 1, generator=generator, dtype=torch.double)[labels]
    return part(images.to(dtype)), part(labels)


def some_steps(settings: SearchSettings, dtype: torch.dtype) -> dict:
    """The gradients that both optimisers saw and the alphas, of every step; losses; weights and statistics at the end."""
    searcher = Searcher(SPACE, settings, 4, seed=0, device="cpu")
    searcher.net.to(dtype), searcher.classifier.to(dtype)
    seen: dict = {"alphas": [], "losses": [], "weight gradients": [], "alpha gradients": []}

    def keep(name):
        def hook(optimizer, *_):
            gradients = [None if p.grad is None else p.grad.clone() for p in optimizer.param_groups[0]["params"]]
            seen[name].append(gradients)
        return hook

    searcher.weight_optimizer.register_step_pre_hook(keep("weight gradients"))
    searcher.alpha_optimizer.register_step_pre_hook(keep("alpha gradients"))
    for step in range(STEPS[dtype]):
        train = batch(2 * step, dtype)
        losses = [*weight_step(searcher, train), arch_step(searcher, train, batch(2 * step + 1, dtype))]
        seen["losses"].append(torch.tensor(losses))
        seen["alphas"].append([alpha.detach().clone() for alpha in searcher.net.arch_parameters()])
    seen["weights"] = [w.detach().clone() for w in searcher.weights]
    seen["buffers"] = [b.clone() for b in searcher.net.buffers()]
    return seen


def equal_steps(folder: Path) -> dict:
    return {variant: some_steps(replace(SETTINGS, method=variant[0], lr=variant[2]), variant[1]) for variant in VARIANTS}


def own_norms(folder: Path) -> dict:
    """As the processes usually are: each with its own batch norms and dropout, with and without triplets of all."""
    usual = replace(SETTINGS, method="gdas", dropout=0.5, sync_bn=False)
    found: dict = {gather: some_steps(replace(usual, gather=gather), torch.float) for gather in (True, False)}
    searcher = Searcher(SPACE, usual, 4, seed=0, device="cpu")
    found["noise"] = torch.rand(4), torch.rand(4, generator=searcher.generator)
    weight_step(searcher, batch(0, torch.float))
    found["validation"] = validate(searcher, search_data(samples(folder), usual, 0)), list(searcher.net.buffers())
    return found


def loaded(folder: Path) -> dict:
    """A search of one epoch from the disk."""
    run = Run(folder / f"loaded{parallel.processes()}", {}, resume=False, overwrite=True)
    result = search(SPACE, samples(folder), replace(SETTINGS, alpha_warmup=0, epochs=1), run)
    return {"val_mAP": result.val_mAP, "curves": (run.folder / "curves.csv").read_text()}


CHECKS = (equal_steps, own_norms, loaded)


def samples(folder: Path) -> list:
    return list(data.load("market", folder / "market", parts=("train",)).train)


def search_in(folder: Path, name: str, fault: str = "") -> int:
    """Exit status as of the command: 0 also when stopped, 2 for a user's mistake."""
    settings = replace(SETTINGS, method="gdas", sync_bn=False, dropout=0.3)
    steps, step = 0, autoreid.search.weight_step

    def in_the_seventh(searcher, batch):
        nonlocal steps
        steps += 1
        if steps == 7 and parallel.rank() == 1:
            if fault == "fail":
                raise UserError("planted in process 1")
            os.kill(os.getpid(), signal.SIGTERM)
        return step(searcher, batch)

    if fault:
        autoreid.search.weight_step = in_the_seventh
    try:
        with heeding_sigterm():
            search(SPACE, samples(folder), settings, Run(folder / name, {}, resume=True, overwrite=False))
    except Preempted:
        print("stopped", flush=True)
    except UserError as mistake:
        print(f"autoreid: {mistake}", file=sys.stderr, flush=True)
        return 2
    finally:
        autoreid.search.weight_step = step
    return 0


def main() -> int:
    parallel.start("cpu")
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "later":
        return search_in(folder, "stopped") or search_in(folder, "failed", "fail")
    for check in CHECKS:
        torch.save(check(folder), folder / f"{check.__name__}-{parallel.rank()}.pt")
    return search_in(folder, "whole") or search_in(folder, "stopped", "stop")


if __name__ == "__main__":
    sys.exit(main())

"""Several processes that train one network together: a thin layer on ``torch.distributed``, and nothing with one process.

``torchrun --nproc-per-node N -m autoreid retrain ...`` starts the processes; :func:`start` joins them: gloo for tensors
on the CPU, NCCL for those on GPUs. Every function here but :func:`rank` must be called by all processes alike.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoreid.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # the first process may rank a large gallery while the others wait


def start(device: str) -> str:
    """Join the processes that torchrun started; this one's device ("cuda" becomes the GPU of its own)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        return device
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: with torchrun each process has a GPU of its own; give --device cuda")
    if device == "cuda":
        own = int(os.environ["LOCAL_RANK"])
        if own >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, but there are "
                f"{torch.cuda.device_count()} GPUs: give --nproc-per-node {torch.cuda.device_count()}"
            )
        device = f"cuda:{own}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return device


def kind(device: str) -> str:
    """The device as it stands in a record, without its number: a run may go on on another GPU."""
    return device.split(":")[0]


def end() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """The process that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if processes() > 1:
        gather_objects(None)  # not dist.barrier: with NCCL that one takes a GPU


# ---------------------------------------------------------------------------------------- values
def gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of ranks, on every process. Tensors come back on the CPU."""
    if processes() == 1:
        return [value]
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    lengths = [torch.zeros_like(length) for _ in range(processes())]
    dist.all_gather(lengths, length)
    longest = int(max(lengths))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(processes())]
    dist.all_gather(parts, nn.functional.pad(data, (0, longest - len(data))))
    return [pickle.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


def agree(flag: bool) -> bool:
    """True on every process as soon as one says True."""
    if processes() == 1:
        return flag
    said = torch.tensor([int(flag)])  # on the CPU: no GPU has to wait
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, on every process; what it raises is raised everywhere."""
    if processes() == 1:
        return make()
    made: tuple[bool, Any] = (True, None)
    if is_first():
        try:
            made = (True, make())
        except Exception as fault:
            made = (False, fault)
    good, value = gather_objects(made)[0]
    if not good:
        raise value
    return value


# ---------------------------------------------------------------------------------------- tensors
@torch.no_grad()
def average_(tensors: Iterable[Tensor | None]) -> None:
    """The mean over all processes, in place: one message per type. What is None must be None on every process."""
    _in_one_message(tensors, lambda flat: (dist.all_reduce(flat), flat.div_(processes())))


@torch.no_grad()
def largest(x: Tensor) -> Tensor:
    """Elementwise the largest of all processes' tensors."""
    if processes() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def broadcast_(module: nn.Module) -> None:
    """The first process's parameters and buffers to all: one message per type."""
    _in_one_message((*module.parameters(), *module.buffers()), lambda flat: dist.broadcast(flat, 0))


def _in_one_message(tensors: Iterable[Tensor | None], send: Callable[[Tensor], Any]) -> None:
    """``send`` all tensors of a type and device as one flat tensor, and put what comes of it back into them."""
    if processes() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        send(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # Each process has a loss of its own that reads all parts: a part's gradient is the sum over these losses.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(processes())[rank()]


def gather(x: Tensor) -> Tensor:
    """Every process's B x ..., one after the other along the first dimension; alike in shape. Gradients flow back.

    When every process takes the same loss of the whole and the gradients are then averaged over processes (DDP,
    :func:`average_`), the result is exactly the gradient of that loss.
    """
    return x if processes() == 1 else _Gather.apply(x)


# ---------------------------------------------------------------------------------------- batch norm over all processes
class _SumOverAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SynchronisedBatchNorm(_BatchNorm):
    """A batch norm with the moments of all processes' images, for the CPU: torch's SyncBatchNorm is for GPUs only.

    The variance is the mean of squared deviations from the common mean: two short messages, and no cancellation. All
    processes have equally many images.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # B x C or B x C x H x W
        if input.dim() < 2:
            raise ValueError(f"a batch norm reads B x C or more dimensions, got {input.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and processes() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        over, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        count = x.numel() // x.shape[1] * processes()
        mean = _SumOverAll.apply(x.sum(over)) / count
        centred = x - mean.view(shape)
        variance = _SumOverAll.apply(centred.square().sum(over)) / count
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)  # type: ignore
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / max(count - 1, 1), share)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out


def synchronised(module: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """The module with every batch norm over all processes: torch's on GPUs, ours on the CPU. In place but for a root that
    is a batch norm itself. Parameters stay the same objects, names in the state stay."""
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm) and not isinstance(module, SynchronisedBatchNorm):
        new = SynchronisedBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        new._parameters, new._buffers, new.training = module._parameters, module._buffers, module.training
        return new
    for name, child in module.named_children():
        setattr(module, name, synchronised(child, device))
    return module


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's items: every ``processes``-th, from ``rank`` on."""
    return items[rank() :: processes()]

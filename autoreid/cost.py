"""What a network costs: parameters, multiply-accumulates, activation memory and measured latency.

Idea: run the network once on the *meta* device, where tensors have shapes but no storage, and read the cost off the
aten operations that go by. Nothing is allocated, and no layer has to be known by name.

Three conventions of "FLOPs" are in use, and they differ by 2x and more, so each figure says which one it is:

- ``macs``: multiply-accumulates of convolutions, linear layers and matrix products (attention included), and nothing
  else. It is ``torch.utils.flop_counter.FlopCounterMode`` divided by two, and what most re-ID papers print as FLOPs.
- ``2 * macs``: floating point operations proper.
- ``macs_all``: macs + 1 per bias addition of a convolution or linear layer + 2 per element out of a batch norm + 1 per
  element out of a ReLU (or ReLU6). Robust-ReID (Lawen et al. 2019) reports this one: its 0.72 and 1.68 B fit no other.

Trap: in eval mode torch.nn.MultiheadAttention takes a fused fast path that the counter cannot see (ViT-B/16 comes out
36 % too low, without a word), so the fast path is off while we count and afterwards as it was before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

MATMULS = {aten.mm, aten.bmm}
BATCH_NORMS = {
    aten.native_batch_norm,
    aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
}
RELUS = {aten.relu, aten.relu_}
CLAMPS = {aten.hardtanh, aten.hardtanh_}  # ReLU6 arrives as hardtanh(x, 0, 6)


@dataclass(frozen=True)
class Cost:
    """The cost of one image, batch 1, float32, eval mode.

    params: trainable parameters (``requires_grad``), shared ones once; buffers such as batch norm averages are not in.
    macs: multiply-accumulates of convolutions, linear layers and matrix products.
    macs_all: macs + bias additions + 2 per batch norm element + 1 per ReLU element.
    activation_bytes: peak bytes of live activations, see :class:`_Activations`.
    """

    params: int
    macs: int
    macs_all: int
    activation_bytes: int


class _Elementwise(TorchDispatchMode):
    """Count what FlopCounterMode leaves out: bias additions, batch norm and ReLU, into ``self.operations``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._product: StorageWeakRef | None = None  # output of the last plain matrix product

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._overloadpacket
        if op is aten.convolution:
            self.operations += out.numel() if args[2] is not None else 0
        elif op is aten.addmm:
            self.operations += out.numel()
        elif op in MATMULS:
            self._product = StorageWeakRef(out.untyped_storage())
        elif op in (aten.add, aten.add_):
            self.operations += out.numel() if self._adds_bias(args) else 0
        elif op in BATCH_NORMS:
            self.operations += 2 * out[0].numel()
        elif op in RELUS or (op in CLAMPS and len(args) > 1 and args[1] == 0):
            self.operations += out.numel()
        return out

    def _adds_bias(self, args: tuple) -> bool:
        """Is this ``product + vector``? So torch computes a linear layer whose 3-d or 4-d input is not contiguous."""
        if self._product is None or not all(isinstance(arg, Tensor) for arg in args[:2]):
            return False
        product, bias = args[0], args[1]
        return bias.dim() == 1 and StorageWeakRef(product.untyped_storage()).cdata == self._product.cdata


class _Activations(TorchDispatchMode):
    """Track the peak of live activation bytes, ``self.peak``.

    Precisely: the sum of ``nbytes`` over the distinct storages that (1) are the input images or were returned by an
    aten operation, and (2) still have an owner, taken right after each operation, when its inputs and its outputs
    exist side by side; the largest sum is the peak. Views and in-place operations add nothing, as they share their
    storage. Parameters and buffers are excluded (``ignored``). The input counts to the end, since the caller holds it.
    Whatever eager PyTorch returns counts, so the int64 indices of max pooling (8 bytes each) too; what a kernel
    allocates and frees inside itself (im2col, cuDNN workspaces) does not, and neither does fusion save anything.
    Attention is counted in its plain form, the N x N weights included; a flash kernel never holds those.
    """

    def __init__(self, images: Tensor, ignored: list[Tensor]) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._add([images])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Purge first: what is dead now was freed before this operation could allocate.
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        out = func(*args, **(kwargs or {}))
        # At inference the statistics that batch norm returns are empty; only the meta device gives them a size.
        kept = out[0] if func._overloadpacket in BATCH_NORMS else out
        self._add([leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)])
        return out

    def _add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._ignored:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))


class AttentionInTheOpen:
    """Fused multi-head attention off inside the ``with`` block, as it was before after it."""

    def __enter__(self) -> None:
        self._before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *exc: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._before)


def measure(build: Callable[[], nn.Module], size: tuple[int, int], channels: int = 3) -> Cost:
    """The cost of the network that ``build()`` returns, for one image of ``size`` (height, width) in pixels.

    ``build`` runs on the meta device: no weights are allocated, so it must not load any or look at their values.
    The forward pass takes a 1 x channels x H x W float32 tensor, in eval mode, without gradients.

    >>> measure(lambda: nn.Conv2d(3, 8, 3, padding=1), size=(4, 5))  # 3*8*9 weights on 4*5 places, plus 8 biases
    Cost(params=224, macs=4320, macs_all=4480, activation_bytes=880)
    """
    with torch.device("meta"):
        net = build().eval()
        images = torch.empty(1, channels, *size)
        elementwise = _Elementwise()
        activations = _Activations(images, [*net.parameters(), *net.buffers()])
        flops = FlopCounterMode(display=False)
        # no_grad, not inference_mode: under the latter composite operations (linear, batch_norm) arrive whole.
        with AttentionInTheOpen(), torch.no_grad(), flops, elementwise, activations:
            net(images)
    macs = flops.get_total_flops() // 2
    return Cost(
        params=sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        macs=macs,
        macs_all=macs + elementwise.operations,
        activation_bytes=activations.peak,
    )


def latency(
    net: nn.Module,
    size: tuple[int, int],
    device: str | torch.device = "cpu",
    batch: int = 1,
    repeats: int = 30,
    warmup: int = 5,
    channels: int = 3,
    at_most_s: float = 20.0,
) -> dict[str, str | int | float]:
    """Milliseconds per batch: ``{"device", "batch", "median", "iqr"}``, as ``latency_ms`` of a result JSON.

    ``net`` is moved to ``device`` and timed on batch x channels x H x W random float32 images in eval mode (its mode
    is restored). Median and interquartile range over ``repeats`` passes, or as many (five or more) as ``at_most_s``
    seconds hold, after ``warmup`` passes that are thrown away; on CUDA every pass is synchronised. Threads are the
    caller's business: ``torch.set_num_threads``.
    """
    device = torch.device(device)
    was_training = net.training
    net = net.to(device).eval()
    images = torch.rand(batch, channels, *size, device=device)
    milliseconds: list[float] = []
    with torch.inference_mode():
        while len(milliseconds) < warmup + min(repeats, 5) or (
            len(milliseconds) < warmup + repeats and sum(milliseconds) < 1e3 * at_most_s
        ):
            _wait(device)
            start = time.perf_counter()
            net(images)
            _wait(device)
            milliseconds.append((time.perf_counter() - start) * 1e3)
    net.train(was_training)
    low, median, high = np.percentile(milliseconds[warmup:], [25, 50, 75])
    return {"device": str(device), "batch": batch, "median": float(median), "iqr": float(high - low)}


def _wait(device: torch.device) -> None:
    """CUDA launches return before the work is done; a clock must wait for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

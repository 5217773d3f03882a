"""A network that ``autoreid export`` wrote, run by the program that it was written for: ONNX Runtime, OpenVINO, or
``torch.export``'s own graph. All on the CPU, with as many threads as torch has.

The file says itself how pictures must be prepared (``header["preprocessing"]``), so that the same call serves all of
them, with the normalisation inside the graph or not, and no picture is normalised twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoreid.errors import UserError, unknown
from autoreid.loading import IMAGENET_MEAN, IMAGENET_STD, normalise


class Format(NamedTuple):
    """What a format's files are called, which package runs them, and which others write them."""

    ending: str
    runtime: str
    writers: tuple[str, ...] = ()
    quantisers: tuple[str, ...] = ()  # --int8 needs them too
    extra: str = ""  # of autoreid's, that installs all of these
    int8: bool = True


FORMATS = {
    "onnx": Format(".onnx", "onnxruntime", ("onnx", "onnxscript"), extra="onnx"),
    "torch-export": Format(".pt2", "torch", int8=False),
    "openvino": Format(".xml", "openvino", quantisers=("nncf",), extra="openvino"),
}
HEADER = "autoreid"  # the key under which every format keeps the description, a JSON object
INPUT, EMBEDDING = "images", "embedding"


def find_format(name: str, int8: bool = False, writing: bool = True) -> Format:
    """The format of that name. Raises UserError: none, it has no int8, or a package is missing."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    found = FORMATS[name]
    if int8 and not found.int8:
        able = " and ".join(n for n, other in FORMATS.items() if other.int8)
        raise UserError(f"--format {name} has no --int8 here; the formats that have are {able}")
    wanted = [found.runtime, *(found.writers if writing else ()), *(found.quantisers if int8 else ())]
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        option = f"--format {name}{' --int8' * int8}" if writing else f"a {found.ending} file"
        raise UserError(f"{option} needs {' and '.join(missing)}, which is not installed: pip install "
                        f"'autoreid[{found.extra}]'")
    return found


class Opened(NamedTuple):
    """A file in its runtime: ``run`` takes B x 3 x H x W of the input's type and gives the outputs, B x D each."""

    header: str
    run: Callable[[Tensor], list[Tensor]]
    settings: dict[str, Any]


def _open_onnx(path: Path, threads: int, default: bool) -> Opened:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if not default:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Opened(
        session.get_modelmeta().custom_metadata_map.get(HEADER, ""),
        lambda images: [torch.from_numpy(out) for out in session.run(None, {INPUT: images.numpy()})], {},
    )


def _open_torch(path: Path, threads: int, default: bool) -> Opened:
    said = {HEADER: ""}
    module = torch.export.load(path, extra_files=said).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            out = module(images)
        return list(out) if isinstance(out, (list, tuple)) else [out]

    return Opened(said[HEADER], run, {})


def _open_openvino(path: Path, threads: int, default: bool) -> Opened:
    with no_telemetry():
        import openvino

        model = openvino.Core().read_model(path)
        # Where the processor has units for it OpenVINO computes in bfloat16 of its own accord: two digits instead of seven.
        asked = {} if default else {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(model, "CPU", asked)
    request = compiled.create_infer_request()
    return Opened(
        model.get_rt_info(HEADER).value if model.has_rt_info(HEADER) else "",
        lambda images: [torch.from_numpy(out) for out in request.infer([images.numpy()]).values()],
        {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string()},
    )


OPEN = {"onnx": _open_onnx, "torch-export": _open_torch, "openvino": _open_openvino}


@contextmanager
def no_telemetry() -> Iterator[None]:
    """OpenVINO's tools report their use to Intel unless the user has opted out; not within the block."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


class Exported(nn.Module):
    """An exported file as a callable: B x 3 x H x W -> B x dims float32, in its own runtime on the CPU.

    Images are pixels (uint8, 0 to 255, RGB) or float32 normalised as ``loading.normalise`` does it; whichever the graph
    takes, the other is turned into it. ``header``: what the file says of itself. ``runtime``: name, version, threads and
    the precision, where it is the runtime's to choose. It takes the place of a ReIDNet in ``evaluate`` and ``cost``.
    """

    def __init__(self, path: str | Path, default: bool = False) -> None:
        """``default``: with the runtime's own settings, not ours (float32, torch's number of threads)."""
        super().__init__()
        self.path = Path(path)
        kind = next((name for name, found in FORMATS.items() if self.path.suffix == found.ending), None)
        if kind is None:
            endings = ", ".join(found.ending for found in FORMATS.values())
            raise UserError(f"{path} is no exported network: their names end in {endings}")
        if not self.path.is_file():
            raise UserError(f"no exported network at {path}: `autoreid export` writes one")
        runtime, threads = find_format(kind, writing=False).runtime, torch.get_num_threads()
        try:
            header, self._run, settings = OPEN[kind](self.path, threads, default)
        except Exception as fault:  # each runtime has its own
            raise UserError(f"{path} cannot be opened by {runtime} ({_first_line(fault)}): damaged, or written by a newer "
                            "version; export it again") from fault
        self.header: dict[str, Any] = json.loads(header or "{}")
        if self.header.get("format") != "autoreid-export":
            raise UserError(f"{path} was not written by `autoreid export`: it does not say how to prepare pictures for it")
        self.runtime = {"name": runtime, "version": metadata.version(runtime), "threads": threads, **settings}
        self.input_size = tuple(self.header["preprocessing"]["size"])
        self.inside = bool(self.header["preprocessing"]["inside"])
        self.batch: int | None = self.header["preprocessing"]["batch"]
        self.dims, self.int8 = self.header["embedding"]["dims"], self.header["embedding"]["scales"][-1]

    def run(self, images: Tensor) -> list[Tensor]:
        """The graph as it is: ``images`` of its own type and batch size; its outputs."""
        return self._run(images)

    def prepared(self, images: Tensor) -> Tensor:
        """The images as the graph takes them, in one piece of memory."""
        if tuple(images.shape[1:]) != (3, *self.input_size):
            height, width = self.input_size
            raise UserError(f"{self.path} takes pictures of B x 3 x {height} x {width}, and these are "
                            f"{' x '.join(map(str, images.shape))}; resize them")
        if images.dtype == torch.uint8:
            return images.contiguous() if self.inside else normalise(images)
        return pixels(images).contiguous() if self.inside else images.float().contiguous()

    def exits(self, images: Tensor) -> list[Tensor]:
        """All outputs, B x dims each: one, or one per exit. A graph of a fixed batch gets it filled up."""
        ready = self.prepared(images)
        if self.batch is None:
            return self.run(ready)
        found = []
        for chunk in ready.split(self.batch):
            filled = torch.cat([chunk, chunk[-1:].expand(self.batch - len(chunk), -1, -1, -1)])
            found.append([out[: len(chunk)] for out in self.run(filled.contiguous())])
        return [torch.cat(outs) for outs in zip(*found, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        return self.exits(images)[-1]


def open_exported(path: str | Path) -> Exported:
    """The network in a file of ``autoreid export``: see :class:`Exported`. Raises UserError: no such file, damaged, of
    another program, its runtime not installed."""
    return Exported(path)


def pixels(images: Tensor) -> Tensor:
    """The uint8 pixels that ``loading.normalise`` made into these floats: exact, as two of them lie 0.017 apart or more."""
    mean, std = (255 * torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean).round_().clamp_(0, 255).to(torch.uint8)


def _first_line(fault: BaseException) -> str:
    lines: Sequence[str] = str(fault).strip().splitlines()
    return (lines[0] if lines else type(fault).__name__)[:200]

"""A trained network as a file for another program: ONNX, OpenVINO's IR, or ``torch.export``'s graph.

All three begin with one ``torch.export`` of the network in eval mode, so what differs is only who reads it. The file
says how pictures are prepared (``header["preprocessing"]``); it is opened again by its runtime and held against PyTorch
on real training images before it takes its name. Accuracy and latency are the runtime's, measured.

ONNX goes by ``dynamo=True``: the older exporter, which traces one example, writes HA-CNN's reshapes with the example's
batch size in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid import cost, data
from autoreid.cost import AttentionInTheOpen
from autoreid.errors import UserError
from autoreid.evaluate import USUAL, Evaluation, check_task, extract_both
from autoreid.heads import ExitsHead, ReIDNet
from autoreid.loading import load_images, normalise
from autoreid.network import ModelSpec, load_weights
from autoreid.runs import environment, folder_name, say, write_bytes, write_json
from autoreid.runtimes import EMBEDDING, FORMATS, HEADER, INPUT, Exported, find_format, no_telemetry, open_exported
from autoreid.train import again, measure

__all__ = ["FORMATS", "Exported", "Graph", "Plan", "export", "open_exported", "parity", "write"]

IMAGES = 128  # to calibrate with and to compare on
FEWEST = 32
BATCH = 16  # of a dynamic graph, beside 1
# What may differ from PyTorch: float32 by another order of sums, int8 by its 256 steps, and what that costs is the mAP's to
# say; below 0.7 for one picture of 128 something is broken (trained nets of ours: 0.86 to 0.9998).
TOLERANCE = 1e-3  # of the largest value
COSINES = {False: 0.999, True: 0.7}


@dataclass(frozen=True)
class Plan:
    """What is to be written. ``exit``: None (the embedding), a number from 1 (that exit's, and nothing after it) or "all";
    ``inside``: the graph takes uint8 pixels and normalises them; ``batch``: None for any number of pictures."""

    format: str
    int8: bool = False
    inside: bool = False
    exit: int | str | None = None
    batch: int | None = None

    def name(self, stem: str, with_format: bool) -> str:
        """``stem`` with what tells this plan's file, or with its format this plan's result, from the others."""
        words = {
            "exits" if self.exit == "all" else f"exit{self.exit}": self.exit is not None, self.format: with_format,
            "int8": self.int8, "inside": self.inside, f"b{self.batch}": self.batch is not None,
        }
        return "-".join([stem, *(word for word, applies in words.items() if applies)])

    def file_beside(self, weights: str | Path) -> Path:
        """Where it goes if the user does not say."""
        path = Path(weights)
        return path.with_name(self.name(path.stem, False) + FORMATS[self.format].ending)


def files_of(path: Path) -> list[Path]:
    """The files of an export: OpenVINO's weights, or nothing; the file that is opened; its record."""
    return [*([path.with_suffix(".bin")] if path.suffix == ".xml" else []), path, path.with_name(f"{path.name}.json")]


def result_of(weights: str | Path, plan: Plan, dataset: str, results: str | Path | None) -> Path:
    """The result's file, under ``results``; where that is None beside the weights if these lie in the dataset's folder or
    in one inside it, else under ``results`` in the working folder."""
    path, folder = Path(weights), folder_name(dataset)
    beside = results is None and folder in [parent.name for parent in path.absolute().parents[:2]]  # or a folder in it
    name, seed = re.fullmatch(r"(.*?)((?:-s\d+)?)", path.stem).groups()  # type: ignore[union-attr]
    return (path.parent if beside else Path(results or "results") / folder) / f"{plan.name(name, True)}{seed}.json"


# ---------------------------------------------------------------------------------------- the graph
class Graph(nn.Module):
    """What is exported of a net: B x 3 x H x W, float32 normalised or (``inside``) uint8 pixels, to its outputs.

    One output B x dims, or a tuple of one per exit. The net is put in eval mode; cut at an exit it loses its later parts.
    """

    factor: Tensor
    shift: Tensor

    def __init__(
        self, net: ReIDNet, plan: Plan, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.net, self.inside, self.size = net.eval(), plan.inside, size
        last = len(net.head.stages) if isinstance(net.head, ExitsHead) else 0
        if plan.exit is not None and not last:
            raise UserError(f"--exit {plan.exit}: this net has no exits; train one with `autoreid retrain MODEL --set "
                            "head=exits`, or leave --exit out")
        if isinstance(plan.exit, int) and not 1 <= plan.exit <= last:
            raise UserError(f"--exit {plan.exit}: the net has {last} exits; allowed: 1 to {last}, or all")
        self.exit = None if plan.exit == last else plan.exit  # the last one gives the embedding
        self.outputs = [f"exit_{n + 1}" for n in range(last)] if plan.exit == "all" else [EMBEDDING]
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (mean, std))
        self.register_buffer("factor", (1 / (255 * std_)).float())
        self.register_buffer("shift", (-mean_ / std_).float())
        if isinstance(self.exit, int):
            self._drop_unread()

    @property
    def scales(self) -> list[float | None]:
        """Of every output: what its int8 codes are multiplied by, None for one that is not quantised."""
        if self.exit is None:
            return [self.net.scale]
        stores: nn.ModuleList = self.net.head.stores  # type: ignore[assignment]
        last = len(stores) - 1
        chosen = [*range(last - 1), last] if self.exit == "all" else [int(self.exit) - 1]
        quantisers: list[Any] = [stores[i].embedding for i in chosen]
        return [None if quantiser is None else float(quantiser.scale) for quantiser in quantisers]

    def embeddings(self, images: Tensor) -> list[Tensor]:
        """All outputs of normalised float32 images."""
        if self.exit is None:
            return [self.net(images)]
        head: ExitsHead = self.net.head  # type: ignore[assignment]
        stages = self.net.backbone.stages(images)  # type: ignore[operator]
        if self.exit == "all":
            return list(head.walk(stages))
        number = int(self.exit) - 1  # without the heads on the way
        return [head.finish(number, head.stages[number](next(islice(stages, number, None))))]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.inside:
            images = images.to(torch.float32) * self.factor + self.shift
        found = self.embeddings(images)
        return found[0] if len(found) == 1 else tuple(found)

    def _drop_unread(self) -> None:
        """Take away the parameters that the outputs do not depend on, and the buffers of their modules: torch.export would
        keep them all in the file."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            outputs = self.embeddings(torch.zeros(1, 3, *self.size))
            gradients = torch.autograd.grad([out.sum() for out in outputs], trained, allow_unused=True)
        unread = {id(parameter) for parameter, gradient in zip(trained, gradients, strict=True) if gradient is None}
        for module in self.modules():
            own = {id(p) for p in module.parameters(recurse=False) if p.requires_grad}
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in unread or (own and own <= unread):
                    module._parameters[name] = None
            if own and own <= unread:
                for name in module._buffers:
                    module._buffers[name] = None


class _Embedding(nn.Module):
    """A graph in the place of a net: normalised images to the last output, whatever the graph itself takes and gives."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        return self.graph.embeddings(images)[-1]


def trace(graph: Graph, plan: Plan) -> torch.export.ExportedProgram:
    """The graph by ``torch.export``, of any batch size or of the plan's. Raises UserError for what it cannot follow."""
    kind = torch.uint8 if plan.inside else torch.float32
    # A batch of 1 would be taken for a constant.
    example = torch.zeros(plan.batch or 2, 3, *graph.size, dtype=kind)
    dynamic = None if plan.batch else ({0: torch.export.Dim("batch")},)
    with _translating(plan.format), torch.no_grad(), AttentionInTheOpen():  # no other format knows the fused attention
        return torch.export.export(graph.eval(), (example,), dynamic_shapes=dynamic)


@contextmanager
def _quiet() -> Iterator[None]:
    """The writers' own words: stdout is for figures, and a failure is said by us."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _translating(format: str) -> Iterator[None]:
    """One line for what a format or a writer cannot express, with the operation's name where there is one."""
    try:
        with _quiet(), no_telemetry():
            yield
    except (UserError, MemoryError, KeyboardInterrupt, OSError):
        raise
    except Exception as fault:  # every writer has its own, and so has every version
        raise _refusal(format, fault) from fault


def _refusal(format: str, fault: BaseException) -> UserError:
    said, last = str(fault), fault
    while last.__cause__ is not None:
        last = last.__cause__
        said += f"\n{last}"
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", said) or re.search(
        r"No conversion rule found for operations: ([^\n]+)", said)
    others = ", ".join(name for name in FORMATS if name != format)
    if found:
        return UserError(f"--format {format} has no counterpart of the operation {found[1].removesuffix('.default')}: take "
                         f"another format ({others}), or a network without it")
    if "data-dependent" in said:
        code = re.search(r"code: ([^\n]+)", said)
        where = f" ({code[1].strip()})" if code else ""
        return UserError(f"--format {format}: which way the network goes depends on the values in the pictures{where}, and "
                         "an exported graph has one way; take such a choice out of the network")
    first = next(iter(str(last).strip().splitlines()), "")
    return UserError(f"--format {format} cannot express this network: {type(last).__name__}: {first[:300]}; another format "
                     f"may: {others}")


# ---------------------------------------------------------------------------------------- the file
def write(graph: Graph, plan: Plan, path: Path, header: Mapping[str, Any], pictures: Tensor | None = None) -> None:
    """Write the graph to ``path`` in the plan's format, the header in it. Raises UserError: an operation that the format
    does not have. ``pictures``, N x 3 x H x W uint8, calibrate int8.
    """
    program = trace(graph, plan)
    text = json.dumps(header)
    with _translating(plan.format):
        WRITERS[plan.format](program, graph, plan, path, text, _batches(graph, plan, pictures))


def _batches(graph: Graph, plan: Plan, pictures: Tensor | None) -> list[Tensor]:
    """The calibration pictures as the graph takes them, in batches as it takes them."""
    if not plan.int8:
        return []
    assert pictures is not None
    size = plan.batch or BATCH
    whole = [batch for batch in pictures.split(size) if plan.batch is None or len(batch) == size]
    return [batch if plan.inside else normalise(batch) for batch in whole]


def _write_onnx(
    program: torch.export.ExportedProgram, graph: Graph, plan: Plan, path: Path, header: str, batches: Sequence[Tensor]
) -> None:
    dynamic = None if plan.batch else ({0: "batch"},)  # the name that tools show
    made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=graph.outputs, dynamic_shapes=dynamic,
                             verbose=False)
    assert made is not None
    made.model.metadata_props[HEADER] = header
    made.save(path)
    if plan.int8:
        _quantise_onnx(path, batches)


def _quantise_onnx(path: Path, batches: Sequence[Tensor]) -> None:
    """Static quantisation, one scale per output channel of the weights.

    Only of what multiplies matrices: with norms, activations and sums in int8 too a ViT loses ten times as much and gains
    no time. Activations are uint8, for which x86 has the faster instructions.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    folded = path.with_name(f"folded-{path.name}")
    quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
    quantize_static(
        str(folded), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"], activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )


def _write_torch(
    program: torch.export.ExportedProgram, graph: Graph, plan: Plan, path: Path, header: str, batches: Sequence[Tensor]
) -> None:
    torch.export.save(program, path, extra_files={HEADER: header})


def _write_openvino(
    program: torch.export.ExportedProgram, graph: Graph, plan: Plan, path: Path, header: str, batches: Sequence[Tensor]
) -> None:
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({INPUT})
    for output, name in zip(model.outputs, graph.outputs, strict=True):
        output.get_tensor().set_names({name})
    model.reshape({INPUT: openvino.PartialShape([plan.batch or -1, 3, *graph.size])})
    if plan.int8:
        import nncf

        attention = any(isinstance(module, nn.MultiheadAttention) for module in graph.modules())
        model = nncf.quantize(
            model, nncf.Dataset([batch.numpy() for batch in batches]), subset_size=len(batches),
            preset=nncf.QuantizationPreset.MIXED,  # activations that are not symmetric: GELU, hard-swish
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            # it takes half of the time, gains trained nets nothing, and took a mean cosine from 0.996 to 0.935 elsewhere
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    model.set_rt_info(header, [HEADER])
    openvino.save_model(model, str(path), compress_to_fp16=False)


WRITERS: dict[str, Callable[..., None]] = {
    "onnx": _write_onnx, "torch-export": _write_torch, "openvino": _write_openvino,
}


def describe(plan: Plan, graph: Graph, net: ReIDNet, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of itself, under the key ``autoreid``; ``said`` is the weights' header.

    ``preprocessing`` is what the caller does. With the normalisation inside there is none left to do: ``mean`` and ``std``
    are null, and stand under ``in_graph`` instead. ``scales``, one per output: of an embedding that was trained for int8;
    the output is its codes times that, in float32.
    """
    values: dict[str, Any] = {"range": [0, 1], "mean": list(said["mean"]), "std": list(said["std"])}
    todo = {"range": [0, 255], "mean": None, "std": None, "in_graph": values} if plan.inside else values
    return {
        "format": "autoreid-export", "version": 1, "as": plan.format,
        "model": plan.name(said.get("name") or said["model"]["label"], True),
        "preprocessing": {
            "size": list(graph.size), "batch": plan.batch, "layout": "BCHW", "colour": "RGB", "resize": said["resize"],
            "dtype": "uint8" if plan.inside else "float32", "inside": plan.inside, **todo,
        },
        "outputs": graph.outputs,
        "embedding": {"dims": net.dims, "dtype": "float32", "scales": graph.scales, "distance": "euclidean"},
        "exit": plan.exit, "int8": plan.int8,
    }


# ---------------------------------------------------------------------------------------- is it the same?
def parity(exported: Exported, graph: Graph, pictures: Tensor, batch: int) -> dict[str, Any]:
    """Outputs of the file against PyTorch's on uint8 ``pictures``, ``batch`` at a time: the largest absolute difference,
    the smallest and the mean cosine of a picture's vectors (of equal ones 1), and PyTorch's largest absolute value."""
    difference, cosine, largest = 0.0, 1.0, 0.0
    cosines: list[float] = []
    for some in pictures.split(batch):
        with torch.inference_mode():
            wanted = graph.embeddings(normalise(some))
        for ours, theirs in zip(exported.exits(some), wanted, strict=True):
            found = F.cosine_similarity(ours.double(), theirs.double(), dim=1)
            found[(ours == theirs).all(1)] = 1
            cosines += found.tolist()
            difference = _worse(max, difference, (ours - theirs).abs().max().item())
            cosine, largest = _worse(min, cosine, found.min().item()), max(largest, theirs.abs().max().item())
    return {"batch": batch, "images": len(pictures), "max_abs_difference": difference, "min_cosine": cosine,
            "mean_cosine": sum(cosines) / len(cosines), "largest": largest}


def _worse(which: Callable[..., float], one: float, other: float) -> float:
    return other if other != other else which(one, other)  # NaN is the worst


def own_difference(graph: Graph, pictures: Tensor) -> float:
    """The largest difference between PyTorch's outputs for uint8 ``pictures`` one by one and all at once: how far another
    order of sums goes in this network. Some amplify it (Robust-ReID untrained: a thousandth), and no file can do better."""
    with torch.inference_mode():
        images = normalise(pictures)
        singly = zip(*(graph.embeddings(image[None]) for image in images), strict=True)
        pairs = zip(graph.embeddings(images), singly, strict=True)
        return max((together - torch.cat(one)).abs().max().item() for together, one in pairs)


def require_parity(
    found: Sequence[Mapping[str, Any]], plan: Plan, scale: float = 0.0, own: float = 0.0, least: float | None = None
) -> None:
    """A UserError where the file is not the network. ``own``: :func:`own_difference`, of which four times is allowed for.
    An int8 embedding may fall to the next code: one ``scale`` more."""
    wanted = COSINES[plan.int8] if least is None else least
    for row in found:
        difference, cosine = row["max_abs_difference"], row["min_cosine"]
        allowed = TOLERANCE * row["largest"] + 4 * own + 1.01 * scale
        if not cosine >= wanted or not (plan.int8 or difference <= allowed):
            limit = "" if plan.int8 else f", difference at most {allowed:.2g}"
            cure = "calibrate with more --images, lower --min-cosine, or leave --int8 out" if plan.int8 else (
                "take another --format; this one's runtime computes it wrongly")
            raise UserError(
                f"nothing is written: the exported network differs from PyTorch's on {row['images']} training images, "
                f"{row['batch']} at a time, by up to {difference:.3g} where values go up to {row['largest']:.3g}, cosine "
                f"{cosine:.5f}; allowed is cosine at least {wanted:g}{limit}; {cure}"
            )


class _Timed(nn.Module):
    """The runtime alone: a batch of its own type, ready in memory, whatever it is called with."""

    def __init__(self, exported: Exported, pictures: Tensor) -> None:
        super().__init__()
        self.exported, self.images = exported, exported.prepared(pictures)

    def forward(self, images: Tensor) -> Tensor:
        return self.exported.run(self.images)[-1]


# ---------------------------------------------------------------------------------------- the whole job
def export(
    weights: str | Path,
    plan: Plan,
    *,
    out: str | Path | None = None,
    dataset: str | None = None,
    root: str | None = None,
    images: int = IMAGES,
    min_cosine: float | None = None,
    evaluate: bool = True,
    protocol: str | None = None,
    how: Evaluation = USUAL,
    results: str | Path | None = None,
) -> tuple[Path, dict[str, Any], Path | None]:
    """Write, check and measure: the file (what is there is replaced), its record, and the result's path.

    ``images`` of ``dataset``'s training images (default: what the net was trained on) calibrate and are compared on;
    ``evaluate``: its query and gallery are ranked by the file and by PyTorch. The record is ``<out>.json``.
    Raises UserError: a format, option, package or dataset that does not do, an operation the format lacks, a file that does
    not compute what PyTorch computes (which is not left behind).
    """
    find_format(plan.format, plan.int8)
    if images < FEWEST or images < (plan.batch or 0):
        raise UserError(f"--images {images}: give at least {max(FEWEST, plan.batch or 0)}, so that the file is judged by "
                        "enough")
    net, said = load_weights(weights)
    size = (int(said["input"][0]), int(said["input"][1]))
    dataset = dataset or said["dataset"]
    graph = Graph(net, plan, said["mean"], said["std"], size).eval()
    splits = data.load(dataset, root, parts=data.PARTS if evaluate else ("train",))
    rule, lines = check_task(splits.query, splits.gallery, protocol or splits.protocol, how) if evaluate else (None, [])
    step = max(1, len(splits.train) // images)
    chosen = splits.train[::step][:images]
    if len(chosen) < FEWEST:
        raise UserError(f"dataset '{splits.name}' has {len(chosen)} training images; a file is judged by {FEWEST} or more")
    pictures = load_images(chosen, size)
    target = Path(out) if out is not None else plan.file_beside(weights)
    result_path = result_of(weights, plan, splits.name, results) if evaluate else None
    header = describe(plan, graph, net, said)
    header["weights"] = {"file": Path(weights).name, "sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest()}
    compared = {"dataset": splits.name, "part": splits.train_part, "images": len(chosen)}
    header["calibration"] = compared if plan.int8 else None

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        say(f"writing {plan.format}")
        write(graph, plan, made, header, pictures)
        seconds, exported = time.monotonic() - begin, open_exported(made)
        batches = [plan.batch] if plan.batch else [1, BATCH]
        same = [parity(exported, graph, pictures, batch) for batch in batches]
        own = own_difference(graph, pictures[:FEWEST])
        require_parity(same, plan, max(scale or 0.0 for scale in graph.scales), own, min_cosine)
        runtime = exported.runtime | _by_default(made, exported, graph, pictures, batches[-1])
        _place(made, target, result_path)
    exported.path = target
    shown = pictures[: plan.batch or 1]
    latency = {
        name: {**cost.latency(timed, size, "cpu", batch=len(shown)), "threads": torch.get_num_threads()}
        for name, timed in (("exported", _Timed(exported, shown)), ("pytorch", _Embedding(graph)))
    }
    file = {"name": target.name, "bytes": sum(path.stat().st_size for path in files_of(target)[:-1]),
            "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
    record: dict[str, Any] = {
        **header, "file": file, "seconds": seconds, "runtime": runtime, "parity": same, "own_difference": own,
        "latency_ms": latency,
        "evaluation": None, "environment": environment(),
    }
    sidecar = files_of(target)[-1]
    write_json(sidecar, record)
    if rule is None or result_path is None:
        return target, record, None

    spec = ModelSpec.from_dict(said["model"])
    result, _ = measure(exported, spec, header["model"], splits, size, how=how, protocol=rule.name)  # type: ignore[arg-type]
    say("and by PyTorch")
    ours = extract_both(_Embedding(graph), splits.query, splits.gallery, size, rule, "cpu", how).metrics()
    record["evaluation"] = {
        "dataset": splits.name, "protocol": rule.name, "mAP": result["mAP"], "rank1": result["cmc"]["1"],
        "pytorch": {"mAP": ours.mAP, "rank1": ours.cmc[1]}, "mAP_drop": ours.mAP - result["mAP"],
    }
    write_json(sidecar, record)
    origin = again(weights, said, splits)
    if isinstance(plan.exit, int):
        counted = cost.measure(lambda: Graph(spec.build(), plan, said["mean"], said["std"], size), size)
        result |= {"params": counted.params, "macs": counted.macs}
    result |= origin | {
        "model": header["model"], "warnings": [*origin["warnings"], *lines], "latency_ms": latency["exported"],
        "export": {key: record[key] for key in ("as", "int8", "exit", "preprocessing", "file", "runtime", "parity",
                                                "evaluation", "calibration", "weights")},
    }
    write_json(result_path, result)
    return target, record, result_path


def _by_default(path: Path, exported: Exported, graph: Graph, pictures: Tensor, batch: int) -> dict[str, Any]:
    """What a caller gets who leaves the runtime's precision alone, where it is not the one that we measure with."""
    if "precision" not in exported.runtime:
        return {}
    plain = Exported(path, default=True)
    if plain.runtime["precision"] == exported.runtime["precision"]:
        return {}
    return {"by_default": {"precision": plain.runtime["precision"], **parity(plain, graph, pictures, batch)}}


def _place(made: Path, target: Path, result: Path | None) -> None:
    """The new files to their names: what described or used an old one goes first, what is opened comes last."""
    *parts, sidecar = files_of(target)
    for path in (result, sidecar, target):
        if path is not None:
            path.unlink(missing_ok=True)
    for path in parts:
        write_bytes(path, made.with_suffix(path.suffix).read_bytes())


def summary(path: Path, record: Mapping[str, Any]) -> str:
    """The record for a person."""
    runtime, same, takes = record["runtime"], record["parity"], record["preprocessing"]
    size, batch = " x ".join(map(str, takes["size"])), takes["batch"] or "B"
    kind = "uint8 pixels, normalised in the graph" if takes["inside"] else "float32, normalised outside"
    sizes = " and ".join(str(row["batch"]) for row in same)
    lines = [
        f"{path}: {record['file']['bytes'] / 1e6:.2f} MB, takes {batch} x 3 x {size} {kind}; gives "
        f"{', '.join(record['outputs'])} of {record['embedding']['dims']}",
        f"against PyTorch on {same[0]['images']} training images, batches of {sizes}: difference at most "
        f"{max(row['max_abs_difference'] for row in same):.2g} of {max(row['largest'] for row in same):.3g}, cosine at "
        f"least {min(row['min_cosine'] for row in same):.6f}, {same[0]['mean_cosine']:.6f} on average",
    ]
    if by_default := runtime.get("by_default"):
        lines.append(
            f"{runtime['name']} left to itself computes in {by_default['precision']} on this processor: difference at most "
            f"{by_default['max_abs_difference']:.2g}, cosine at least {by_default['min_cosine']:.6f}; the figures here are "
            f"of {runtime['precision']}"
        )
    found, times = record["evaluation"], record["latency_ms"]
    ran = f"{runtime['name']} {runtime['version']}"
    wide = max(len(ran), len("PyTorch"))
    head = f"{'':{wide}}  {'mAP %':>7}  {'rank-1 %':>8}  " if found else f"{'':{wide}}  "
    lines.append(f"{head}{'ms':>8}  {'iqr':>6}  (batch {times['exported']['batch']}, threads {runtime['threads']})")
    rows = ((ran, "exported", found), ("PyTorch", "pytorch", found and found["pytorch"]))
    for name, key, scores in rows:
        shown = f"{100 * scores['mAP']:7.2f}  {100 * scores['rank1']:8.2f}  " if scores else ""
        lines.append(f"{name:{wide}}  {shown}{times[key]['median']:8.3f}  {times[key]['iqr']:6.3f}")
    if found:
        lost = round(100 * found["mAP_drop"], 2) + 0.0  # no -0.00
        lines.append(f"mAP lost by the export: {lost:.2f} points on {found['dataset']}")
    return "\n".join(lines)

"""The derived network (a genotype's cells, stacked) and the one place where a model's name becomes a network."""

from __future__ import annotations

import inspect
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoreid.backbones import BACKBONES, OWN_HEADS
from autoreid.cell import Cell, make_stem, plan_cells
from autoreid.errors import UserError, unknown
from autoreid.genotype import CellGraph, Genotype
from autoreid.heads import HEADS, ReIDNet
from autoreid.ops import OPS, Stripes
from autoreid.options import parse
from autoreid.space import SearchSpace, known_spaces, published


class Edge(nn.Module):
    """One operation of a derived cell, with drop-path: in training the whole edge is left out of an example with
    probability ``drop``, and scaled by 1 / (1 - drop) otherwise (Larsson et al. 2017). Never on an identity: an
    example would lose its only path.
    """

    def __init__(self, operation: nn.Module, drop: float) -> None:
        super().__init__()
        self.operation = operation
        self.drop = 0.0 if isinstance(operation, nn.Identity) else drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(x)
        if self.training and self.drop > 0:
            keep = torch.rand(y.shape[0], 1, 1, 1, device=y.device) >= self.drop
            y = y * keep.to(y.dtype) / (1 - self.drop)
        return y


class CellNet(nn.Module):
    """A backbone from a genotype: stem, then the planned cells (Auto-ReID, Quan et al. 2019, section 3.2).

    B x 3 x H x W -> B x (len(concat) * channels * 2**(stages-1)) x H / 32 x W / 32 with four stages and a stem of
    total stride 4. ``channels`` is the width of the first stage (paper: 64), ``layers`` the cells of each stage.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 64,
        layers: Sequence[int] = (2, 2, 2, 2),
        stem: str = "pool",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path is {drop_path}; allowed: from 0 to below 1")
        stripes = Stripes(genotype.parts, genotype.axis)
        self.stem = make_stem(stem, channels)
        plans = plan_cells(channels, layers, len(genotype.concat))

        def cell(plan, graph: CellGraph) -> Cell:
            operations = iter([op for node in graph for op, _ in node])
            return Cell(
                plan,
                nodes=[[source for _, source in node] for node in graph],
                concat=genotype.concat,
                edge=lambda number, source, stride: Edge(
                    OPS[next(operations)](plan.channels, stride, False, stripes), drop_path
                ),
                affine=True,
            )

        self.cells = nn.ModuleList(cell(p, genotype.reduction if p.reduction else genotype.normal) for p in plans)
        self._last = [i for i, p in enumerate(plans) if i + 1 == len(plans) or plans[i + 1].stage != p.stage]
        self.stage_channels = tuple(plans[i].channels * len(genotype.concat) for i in self._last)
        self.channels = self.stage_channels[-1]

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The map after every stage, one by one."""
        s0 = s1 = self.stem(images)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if i in self._last:
                yield s1

    def forward(self, images: Tensor) -> Tensor:
        return deque(self.stages(images), maxlen=1).pop()  # keeps no earlier map


# ---------------------------------------------------------------------------------------- names to networks
@dataclass(frozen=True)
class ModelSpec:
    """What rebuilds a network: a backbone's name or a genotype, the backbone's options, the head and its options.

    ``label`` is the file-safe name of its results, with the options the user chose: ``resnet18-width20``.
    """

    name: str
    genotype: Genotype | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def build(self, drop_path: float = 0.0) -> ReIDNet:
        """The network with fresh weights; ``drop_path`` is a training matter and only cells have it."""
        if self.genotype is not None:
            backbone: nn.Module = CellNet(self.genotype, drop_path=drop_path, **self.backbone)
        else:
            backbone = BACKBONES[self.name](**self.backbone)
        return ReIDNet(backbone, **self.head)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "genotype": self.genotype.to_dict() if self.genotype else None,
            "backbone": dict(self.backbone),
            "head": dict(self.head),
            "label": self.label,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        genotype = Genotype.from_dict(data["genotype"]) if data["genotype"] else None
        return cls(data["name"], genotype, data["backbone"], data["head"], data["label"])


def known_models() -> list[str]:
    """Every name that :func:`find_model` accepts besides the path of a genotype."""
    return sorted([*BACKBONES, *published(), *(f"random-{space}" for space in known_spaces())])


def find_model(
    name: str, options: Mapping[str, Any] | None = None, match: str | Path | None = None
) -> ModelSpec:
    """The model of this name (a backbone, a published genotype, ``random-<space>``) or in this genotype file.

    ``options`` may name any option of the backbone, ``head`` (another than the model's own) and any option of the head
    (pooling, embedding_dim, neck, ...), and ``genotype_seed`` for a random genotype; an unknown one is a
    :class:`UserError` that lists them. A searched genotype is built in the size that its search recorded, unless
    ``options`` say otherwise.

    ``match`` is a searched ``genotype.json`` to be compared with: a genotype is then built in *its* size, and a
    backbone with a ``width`` as wide as brings its parameters nearest.
    """
    if (Path(name) / "genotype.json").is_file():  # the folder of a search stands for its genotype
        name = str(Path(name) / "genotype.json")
    options, genotype, label = dict(options or {}), None, name
    if name.endswith(".json"):
        genotype = Genotype.load(name)
        path = Path(name).resolve()
        label = path.parent.name if path.stem == "genotype" else path.stem
    elif name in published():
        genotype = Genotype.load(published()[name])
    elif name.startswith("random-") and name.removeprefix("random-") in known_spaces():
        seed = parse("genotype_seed", options.pop("genotype_seed", 0), 0)
        genotype, label = SearchSpace.load(name.removeprefix("random-")).random(seed), f"{name}-g{seed}"
    elif name not in BACKBONES:
        raise unknown("model", name, [*known_models(), "PATH/genotype.json"])
    backbone_names = model_options(CellNet if genotype else BACKBONES[name])
    own_head = OWN_HEADS.get(name, {})
    kind = options.get("head", own_head.get("head", "pooled"))
    if kind not in HEADS:
        raise unknown("head", kind, HEADS)
    if own_head.get("head") == "streams" and kind != "streams":
        raise UserError(f"head={kind}: {name} has the head streams alone; its image regions would be built for nothing")
    head: dict[str, Any] = dict(own_head) if kind == own_head.get("head", "pooled") else {"head": kind}
    head_names = {"head": "", **model_options(HEADS[kind])}
    other = Genotype.load(match) if match else None
    backbone = recorded_size(other or genotype) if genotype else {}
    if "taps" in backbone_names:  # norms that only exits read
        backbone["taps"] = kind == "exits"
    for key, value in options.items():
        if key in backbone_names:
            backbone[key] = parse(key, value, backbone_names[key])
        elif key in head_names:
            head[key] = parse(key, value, head_names[key])
        else:
            raise unknown(f"option of {name}", key, [*backbone_names, *head_names])
    if other and not genotype:
        if "width" not in backbone_names:
            raise UserError(f"--match: {name} has no width to choose; give a model with one, such as resnet18")
        backbone["width"] = options["width"] = _matching_width(name, backbone, ModelSpec(
            "", other, recorded_size(other)))
    label = "-".join([label, *(f"{key.replace('_', '')}{_short({**backbone, **head}[key])}" for key in sorted(options))])
    return ModelSpec(name, genotype, backbone, head, label)


def recorded_size(genotype: Genotype) -> dict[str, Any]:
    """The channels, layers and stem that a search recorded in its genotype's provenance, or nothing."""
    recorded, known = genotype.provenance.get("macro", {}), model_options(CellNet)
    if not isinstance(recorded, Mapping) or not set(recorded) <= set(known):
        raise UserError(f"genotype: provenance macro is {recorded!r}; allowed: an object with {', '.join(sorted(known))}")
    return {key: parse(f"provenance macro {key}", value, known[key]) for key, value in recorded.items()}


def _matching_width(name: str, options: Mapping[str, Any], target: ModelSpec) -> int:
    """The width whose parameters come nearest to the target's; parameters rise with the width."""
    with torch.device("meta"):
        wanted = parameters(target.build().backbone)
        width, best = 1, parameters(BACKBONES[name](**{**options, "width": 1}))
        while best < wanted:
            width += 1
            before, best = best, parameters(BACKBONES[name](**{**options, "width": width}))
        return width - 1 if width > 1 and wanted - before < best - wanted else width


def parameters(net: nn.Module) -> int:
    """How many trainable parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def model_options(build) -> dict[str, Any]:
    """The options of a backbone's or head's function and their defaults; drop_path comes from the recipe."""
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "drop_path"}


# ---------------------------------------------------------------------------------------- weights on disk
def save_weights(path: str | Path, net: ReIDNet, spec: ModelSpec, **metadata: Any) -> None:
    """Safetensors with all that rebuilds the network in the metadata: spec, input size, normalisation.

    The metadata are one JSON value under the key ``autoreid``: the format does not keep the order of several keys, and
    equal weights should be equal files.
    """
    from safetensors.torch import save

    from autoreid.runs import write_bytes

    header = {"format": "autoreid-weights", "version": 1, "model": spec.to_dict(), **metadata}
    tensors = {name: value.contiguous().cpu() for name, value in net.state_dict().items()}
    write_bytes(path, save(tensors, metadata={"autoreid": json.dumps(header)}))


def load_weights(path: str | Path) -> tuple[ReIDNet, dict[str, Any]]:
    """The network in eval mode, and the file's metadata (``model``, ``input``, ``mean``, ``std``, ...)."""
    tensors, header = _read_weights(Path(path))
    net = ModelSpec.from_dict(header["model"]).build()
    net.load_state_dict(tensors)
    net.input_size = (int(header["input"][0]), int(header["input"][1]))
    return net.eval(), header


def wrote(path: str | Path) -> bool:
    """Whether the file is of :func:`save_weights`; False where there is none, or one of another program."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "autoreid" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_same(net: ReIDNet, path: str | Path) -> dict[str, Tensor]:
    """The tensors in the file if they are those of this network, to the shape; else a UserError that says which are not.
    ``net`` may lie on the meta device."""
    tensors, header = _read_weights(Path(path))
    own = net.state_dict()
    odd = sorted(name for name in own.keys() | tensors.keys()
                 if name not in own or name not in tensors or own[name].shape != tensors[name].shape)
    if odd:
        raise UserError(f"--init {path}: the weights of {header['model']['label']}, which is another network: {len(odd)} "
                        f"tensors differ, the first is {odd[0]}; give the same model and options, as `--set`")
    return tensors


def load_same(net: ReIDNet, path: str | Path) -> None:
    """Start from weights that :func:`save_weights` wrote for the same network: fine-tuning."""
    net.load_state_dict(check_same(net, path))


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no weights at {path}: `autoreid retrain` writes them beside its result")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("autoreid", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as fault:
        raise UserError(
            f"{path} is not a safetensors file ({fault}); give the .safetensors that `autoreid retrain` wrote"
        ) from None
    if header.get("format") != "autoreid-weights":
        raise UserError(f"{path} was not written by autoreid: its metadata do not say how to build the network")
    return tensors, header

"""The papers' figures beside ours: parameters, MACs and the claims that arithmetic can check, for docs/reproduction.md.

    python benchmarks/reproduction.py                              # prints every table in Markdown
    python benchmarks/reproduction.py --update docs/reproduction.md

The networks are built on the meta device and counted by ``autoreid.cost.measure``: no weights, no data, no seed. A paper's
figure is written as the paper prints it, and ours *matches to rounding* when it rounds to that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from autoreid.cost import Cost, measure
from autoreid.network import ModelSpec, find_model, parameters
from autoreid.ops import OPS, PartAware, Stripes
from autoreid.options import split_pairs
from autoreid.recipe import RECIPES, Recipe

Size = tuple[int, int]
SQUARE, LARGE, LOW, TALL, USUAL = (224, 224), (350, 350), (160, 64), (384, 128), (256, 128)


# ---------------------------------------------------------------------------------------- counting
class Classified(nn.Module):
    """A net and a classifier for each of its branches."""

    def __init__(self, net: nn.Module, classes: int, bias: bool) -> None:
        super().__init__()
        self.net = net
        self.classifiers = nn.ModuleList(nn.Linear(dims, classes, bias) for dims in net.branch_dims)

    def forward(self, images: Tensor) -> list[Tensor]:
        branches = self.net.branches(images)
        return [layer(b.classified) for layer, b in zip(self.classifiers, branches, strict=True)]


class ToExit(nn.Module):
    """A net with DaRe's head up to exit 1, 2, 3 or 4: the stages up to there and that stage's own head, no other."""

    def __init__(self, net: nn.Module, number: int) -> None:
        super().__init__()
        self.net, self.number = net, number

    def forward(self, images: Tensor) -> Tensor:
        *_, last = islice(self.net.backbone.stages(images), self.number)
        return self.net.head.stages[self.number - 1](last)


def spec_of(name: str, options: str = "") -> ModelSpec:
    """``options`` as on the command line, without its ``--set``: "stem=conv neck=none"."""
    return find_model(name, split_pairs(options.split()))


def count(name: str, options: str, size: Size, classes: int = 0, bias: bool = True, exit_number: int = 0) -> Cost:
    """The cost of a named model with ``classes`` identities to tell apart (0: no classifier) or up to an exit (0: all)."""
    return _count(name, options, size, classes, bias, exit_number)


@cache  # in a fixed form, so that a call with a default and one without share their result
def _count(name: str, options: str, size: Size, classes: int, bias: bool, exit_number: int) -> Cost:
    def build() -> nn.Module:
        net = spec_of(name, options).build()
        return Classified(net, classes, bias) if classes else ToExit(net, exit_number) if exit_number else net

    return measure(build, size)


@cache
def literal_extra(name: str, options: str, size: Size) -> int:
    """The MACs that the part-aware modules' 1 x 1 convolutions would take on the concatenated map, as the paper writes
    them, beyond those of our split form, which multiplies a stripe's vector once and not at every pixel.
    """
    genotype, extra = spec_of(name, options).genotype, 0
    if genotype is None or "part_aware" not in str(genotype):
        return 0

    def hook(module: PartAware, inputs: tuple[Tensor], out: Tensor) -> None:
        nonlocal extra
        vectors = min(module.stripes.parts, inputs[0].shape[2])
        extra += module.fuse_body.weight.numel() * (out.shape[2] * out.shape[3] - vectors)

    with torch.device("meta"), torch.no_grad():
        net = spec_of(name, options).build().eval()
        for module in net.modules():
            if isinstance(module, PartAware):
                module.register_forward_hook(hook)
        net(torch.empty(1, 3, *size))
    return extra


@cache
def caffe_exits() -> tuple[int, ...]:
    """The MACs of DaRe's four exits on Caffe's ResNet-50: it strides in a stage's first 1 x 1 convolution, and netscope
    counts its Scale layers (a batch norm's factor), one an element.
    """
    found = []
    for number in (1, 2, 3, 4):
        scales = 0

        def hook(module: nn.Module, _: tuple, out: Tensor) -> None:
            nonlocal scales
            scales += out.numel()

        def build(number: int = number, hook: Callable = hook) -> nn.Module:
            net = spec_of("dare-r50").build()
            for layer in net.backbone.layers[1:]:
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(hook)
            return ToExit(net, number)

        macs = measure(build, USUAL).macs
        found.append(macs + scales)
    return tuple(found)


# ---------------------------------------------------------------------------------------- a row and its verdict
class Figure(NamedTuple):
    """A number as printed, "26 M" or "523,568,640", and its unit."""

    text: str

    @property
    def unit(self) -> float:
        return {"M": 1e6, "G": 1e9}.get(self.text[-1], 1)

    @property
    def number(self) -> str:
        return self.text.rstrip(" MG").replace(",", "")

    def matches(self, ours: int) -> bool:
        return f"{ours / self.unit:.{len(self.number.partition('.')[2])}f}" == self.number

    def difference(self, ours: int) -> float:
        return 100 * (ours / (float(self.number) * self.unit) - 1)


@dataclass(frozen=True)
class Row:
    """A network, the paper's figures of it (empty: none) and how we read them."""

    name: str
    options: str
    size: Size
    params: str = ""
    flops: str = ""
    reading: str = ""
    classes: int = 0
    bias: bool = True
    convention: str = "macs"

    @property
    def label(self) -> str:
        classifier = [f"{self.classes}-way classifier{'' if self.bias else ' without bias'}"] if self.classes else []
        return ", ".join([f"`{self.name}`", *(f"`{option}`" for option in self.options.split()), *classifier])

    def at(self, size: Size) -> Cost:
        return count(self.name, self.options, size, self.classes, self.bias)

    @property
    def cost(self) -> Cost:
        return self.at(self.size)

    @property
    def figures(self) -> list[tuple[str, Figure, int]]:
        both = [("parameters", self.params, self.cost.params), ("FLOPs", self.flops, getattr(self.cost, self.convention))]
        return [(what, Figure(text), ours) for what, text, ours in both if text]


def judged(figures: Sequence[tuple[str, Figure, int]], reading: str) -> tuple[str, str, str]:
    """The paper's figures, the differences and the verdict of a row."""
    if not figures:
        return "-", "-", reading
    found = [what for what, figure, ours in figures if figure.matches(ours)]
    if len(figures) == 1:
        words = "matches" if found else "does not match"
    else:
        words = "both match" if len(found) == 2 else f"{found[0]} match" if found else "neither matches"
    return (", ".join(figure.text for _, figure, _ in figures),
            ", ".join(f"{figure.difference(ours):+.1f} %" for _, figure, ours in figures),
            f"{words}: {reading}" if reading else words)


def markdown(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    rows = [list(header), *([f"{v:,}" if isinstance(v, int) else str(v) for v in line] for line in lines)]
    cells = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([cells[0], "|" + "---|" * len(rows[0]), *cells[1:]])


Column = Callable[[Row], object]


def table(rows: Iterable[Row], extra: Mapping[str, Column]) -> str:
    """The common table; ``extra`` columns stand behind the MACs."""
    header = ["model", "input", "paper", "parameters", "MACs", *extra, "difference", "verdict"]
    lines = []
    for row in rows:
        paper, difference, verdict = judged(row.figures, row.reading)
        lines.append([row.label, "x".join(map(str, row.size)), paper, row.cost.params, row.cost.macs,
                      *(column(row) for column in extra.values()), difference, verdict])
    return markdown(header, lines)


# ---------------------------------------------------------------------------------------- the rows
NO_ATTENTION = "global_attention=false local_attention=false"
SAFR = [
    Row("resnet50", "neck=none", SQUARE, "26 M", "4 G",
        "the Baseline with the ImageNet classifier, which section 4.3 removes", 1000),
    Row("safr-baseline", "", SQUARE, "26 M", "4 G", "the default, without dense layers as section 4.3 has it"),
    Row("safr-baseline", "last_stride=1", SQUARE, "26 M", "4 G", "as the authors' code has it"),
    Row("safr-large", "", SQUARE, "30 M", "4.5 G", "the default, and the one reading that comes to 30 M"),
    Row("safr-large", "dbam_site=out dbam_where=first mask=soft", SQUARE, "30 M", "4.5 G",
        "as the authors' code has it"),
    Row("safr-large", "dbam_where=all", SQUARE, "30 M", "4.5 G", "'at all ResNet bottlenecks', taken literally"),
    Row("safr-large", "dbam_site=out", SQUARE, "30 M", "4.5 G", "on the blocks' outputs"),
    Row("safr-large", "dbam_site=out dbam_where=all", SQUARE, "30 M", "4.5 G", "on all blocks' outputs"),
    Row("safr-large", "dbam_site=out dbam_where=all attention_conv=depthwise", SQUARE, "30 M", "4.5 G",
        "the nearest to 4.5 G"),
    Row("safr-medium", "", SQUARE, "21 M", "3.8 G", "the default"),
    Row("safr-medium", "attention_conv=dense", SQUARE, "21 M", "3.8 G", "dense attention convolutions"),
    Row("safr-small", "", SQUARE, "12 M", "1.8 G", "the default"),
    Row("safr-small", "attention_conv=dense", SQUARE, "12 M", "1.8 G", "dense attention convolutions"),
    Row("safr-small", "", SQUARE, "12 M", "1.8 G", "with the ImageNet classifier, as the Baseline's 26 M", 1000),
    Row("safr-micro", "", SQUARE, "1.5 M", "0.13 G", "the default"),
    Row("safr-micro", "attention_conv=dense", SQUARE, "1.5 M", "0.13 G", "dense attention convolutions"),
    Row("safr-micro", NO_ATTENTION, SQUARE, "1.5 M", "0.13 G", "without the attention"),
    Row("safr-micro", f"{NO_ATTENTION} projection=after", SQUARE, "1.5 M", "0.13 G",
        "without it, and with the last convolution on the pooled map, which is in no text"),
]
FIGURE_5 = [
    Row(f"safr-fig5-{part}", "", SQUARE, reading=reading)
    for part, reading in (
        ("baseline", "ResNet-50 only"), ("batch-norm", "BNNeck, its shift frozen"), ("layer-norm", "LayerNorm neck"),
        ("global", "global attention"), ("local", "local attention"), ("all", "the three: `safr-large`"),
    )
]
SHUFFLENET = [
    Row(f"shufflenet-v2-plus-{size}", "tail=published neck=none", SQUARE, params, flops, reading, 1000, False)
    for size, params, flops, reading in (
        ("small", "5.1 M", "156 M", ""),
        ("medium", "5.6 M", "222 M", "its README cuts the digits off"),
        ("large", "6.7 M", "360 M", "its README cuts the digits off"),
    )
]
ROBUST_1X, ROBUST_2X = ("2.9 M", "0.72 G"), ("6.4 M", "1.68 G")
ROBUST = [Row(*row, convention="macs_all") for row in (
    ("robust-reid-1x", "", LOW, *ROBUST_1X, "the default"),
    ("robust-reid-2x", "", LOW, *ROBUST_2X, "the default, every layer of Table 1; 0.61 M of the sum below it are in none"),
    ("robust-reid-2x", "embedding_dim=1216", LOW, *ROBUST_2X, "what would make up the sum; Table 1 has 960"),
    ("robust-reid-1x", "conv_bias=false", LOW, *ROBUST_1X, "no biases in convolutions"),
    ("robust-reid-2x", "conv_bias=false", LOW, *ROBUST_2X, "no biases in convolutions"),
    ("robust-reid-1x", "local_stride=1", LOW, *ROBUST_1X, "Table 1's printed stride, which contradicts its map sizes"),
    ("robust-reid-2x", "local_stride=1", LOW, *ROBUST_2X, "Table 1's printed stride, which contradicts its map sizes"),
    ("robust-reid-1x", "shared_local=false", LOW, *ROBUST_1X, "a local block for every region"),
)] + [
    Row("robust-reid-1x", "", LOW, *ROBUST_1X, "with classifiers", 751, False, "macs_all"),
    Row("ha-cnn", "", LOW, "2.7 M", "", "the default, torchreid's structure"),
    Row("ha-cnn", "", LOW, "2.7 M", "", "with classifiers", 751, False),
    Row("ha-cnn", "", LOW, "4.5 M", "0.5 G", "torchreid's model zoo: its counter takes the local blocks, 526,272 "
        "parameters that four regions share, four times: 4,507,928"),
    Row("resnet50", "last_stride=1", USUAL, "25 M", "4.1 G", "as Bag of Tricks has it, with its classifier", 751, False),
]
COLUMNS = [
    Row(f"robust-reid-{column}", "", LOW, params, flops, reading, convention="macs_all")
    for column, params, flops, reading in (
        ("a", "", "", "HA-CNN, tricks alone"), ("b", "", "", "h without L2"), ("c", "", "", "h with inception blocks"),
        ("d", "", "", "h; the hinge is the recipe's"), ("e", "", "", "h with average pooling"),
        ("f", *ROBUST_1X, "h at 1x"), ("g", *ROBUST_1X, "f; SWAG is the recipe's"),
        ("h", *ROBUST_2X, "all but SWAG"), ("full", *ROBUST_2X, "h; SWAG is the recipe's"),
    )
]
NETSCOPE = (523_568_640, 1_150_094_336, 2_060_915_200, 2_542_295_040)  # budgeted_stream/main.py of DaRe's authors
TRINET = 2_528_948_224  # the same file
STEMS = {"": "the default stem", "stem=conv ": "DARTS' stem, two convolutions of stride 2"}
GENOTYPES = {  # Table 1, where Table 4 is no finer
    "darts-v2": ("9.1 M", "1.75 G"), "gdas-v1": ("13.5 M", "2.3 G"), "autoreid-baseline": ("11.9 M", "2.03 G"),
    "autoreid-baseline-reid": ("10.9 M", "1.7 G"), "autoreid-retrieval-reid": ("11.4 M", "1.8 G"),
}
RESNETS = (("resnet18", "11.6 M", "1.7 G"), ("resnet34", "21.7 M", "3.4 G"), ("resnet50", "25.1 M", "3.8 G"))
AUTOREID = [
    *(Row(name, "neck=none", TALL, *figures, "", 751) for name, *figures in RESNETS),
    Row("resnet50", "neck=batch", TALL, "25.1 M", "3.8 G",
        "BNNeck; a shift that learns would add 2,048 more and round to 25.1", 751),
    *(Row(name, f"{stem}neck=none", TALL, *figures, words, 751)
      for name, figures in GENOTYPES.items() for stem, words in STEMS.items()),
    Row("darts-v2", "stem=conv neck=none embedding_dim=512", TALL, "9.1 M", "1.75 G",
        "with the embedding layer of section 3.2", 751),
]
VIT = [
    Row("vit-b16", "neck=none", USUAL, reading="129 tokens; the paper gives no count"),
    Row("vit-b16", "", USUAL, reading="as built, with a BNNeck"),
    Row("vit-b16", "embedding=32", USUAL, reading="sliced to 32: the encoder stays whole"),
    Row("vit-b16", "grid=14x14 neck=none", SQUARE, reading="197 tokens"),
    Row("vit-b16", "grid=14x14", SQUARE, reading="as built"),
]
OSNET = [
    Row(f"osnet-x{width}", "", USUAL, params, flops)
    for width, params, flops in (
        ("1.0", "2.2 M", "0.98 G"), ("0.75", "1.3 M", "0.57 G"), ("0.5", "0.6 M", "0.27 G"), ("0.25", "0.2 M", "0.08 G"),
    )
]


def literal_macs(row: Row) -> int:
    return row.cost.macs + literal_extra(row.name, row.options, row.size)


ALL: dict[str, Column] = {"MACs, all": lambda row: row.cost.macs_all}
COMMON: dict[str, tuple[list[Row], dict[str, Column]]] = {
    "SAFR, its Table 2": (SAFR, {"MACs at 350x350": lambda row: "-" if row.name == "safr-micro" else row.at(LARGE).macs}),
    "SAFR, the networks of its Figure 5": (FIGURE_5, {}),
    "ShuffleNetV2+, of which SAFR-Micro is made": (SHUFFLENET, {}),
    "Robust-ReID, its Table 1, and HA-CNN": (ROBUST, ALL),
    "Robust-ReID, the networks of its Table 2": (COLUMNS, ALL),
    "Auto-ReID, its Tables 1 and 4": (AUTOREID, {
        "MACs, literal": literal_macs,
        "in units of 1000 x 2^20": lambda row: f"{literal_macs(row) / 2**20 / 1e3:.2f}",
    }),
    "ViT-B/16, the encoder of Embedding Compression": (VIT, {}),
    "OSNet, in torchreid's model zoo": (OSNET, {}),
}


# ---------------------------------------------------------------------------------------- tables of another form
def dare_exits() -> str:
    lines = []
    for name in ("dare-r50", "dare-d201"):
        for number in (1, 2, 3, 4):
            macs, paper = count(name, "", USUAL, exit_number=number).macs, Figure(f"{NETSCOPE[number - 1]:,}")
            theirs: list[object] = ["-"] * 4
            if name == "dare-r50":
                caffe = caffe_exits()[number - 1]
                theirs = [paper.text, f"{paper.difference(macs):+.1f} %", caffe, f"{paper.difference(caffe):+.1f} %"]
            lines.append([f"`{name}`, exit {number}", macs, head_macs(name, number), *theirs])
    return markdown(["network", "MACs", "of its head", "authors' code", "difference", "Caffe's ResNet-50", "difference"],
                    lines)


def head_macs(name: str, number: int) -> int:
    with torch.device("meta"):
        net = spec_of(name).build()
    return measure(lambda: net.head.stages[number - 1], (1, 1), net.backbone.stage_channels[number - 1]).macs


def trinet() -> Cost:
    """TriNet: a ResNet-50 and the last of DaRe's heads."""
    with torch.device("meta"):
        net = spec_of("dare-r50").build()
    macs = count("dare-r50", "", USUAL, exit_number=4).macs
    return Cost(parameters(net.backbone) + parameters(net.head.stages[3]), macs, 0, 0)


def dare_networks() -> str:
    lines: list[list[object]] = []
    for name, options, words in (
        ("dare-r50", "", "all four heads and their sum, which the last exit gives"), ("dare-d201", "", "the same"),
        ("resnet50", "neck=none", "backbone of the first"),
        ("densenet201", "neck=none", "backbone of the second, without the norms of DaRe's taps"),
    ):
        cost = count(name, options, USUAL)
        lines.append([f"`{name}`" + f", `{options}`" * bool(options), cost.params, cost.macs, words])
    paper, macs = Figure(f"{TRINET:,}"), trinet().macs
    lines.append(["TriNet: `resnet50` and the last head", trinet().params, macs,
                  f"authors' code: {paper.text} MACs, {paper.difference(macs):+.1f} %"])
    params = macs = 0
    for name in ("resnet18", "resnet34", "resnet50"):
        cost = count(name, "neck=none", USUAL)
        params, macs = params + cost.params, macs + cost.macs
        lines.append([f"sequential ensemble up to `{name}`", params, macs, "the baseline of its Figure 5, without heads"])
    return markdown(["network", "parameters", "MACs", "what"], lines)


def part_aware() -> list[tuple[int, Size, Cost, Cost]]:
    """Channels, map, two separable convolutions and the part-aware module, in the four stages at 384 x 128."""
    def cost(operation: str, channels: int, size: Size) -> Cost:
        return measure(lambda: OPS[operation](channels, 1, False, Stripes()), size, channels)

    stages = [(64 << stage, (96 >> stage, 32 >> stage)) for stage in range(4)]
    return [(*stage, cost("sep_conv_3x3", *stage), cost("part_aware", *stage)) for stage in stages]


def part_aware_table() -> str:
    return markdown(
        ["channels", "map", "`sep_conv_3x3`: parameters", "MACs", "`part_aware`: parameters", "MACs", "MACs, literal",
         "ratios"],
        ([channels, "x".join(map(str, size)), sep.params, sep.macs, part.params, part.macs, literal,
          ", ".join(f"{x / y:.2f}" for x, y in ((part.params, sep.params), (part.macs, sep.macs), (literal, sep.macs)))]
         for channels, size, sep, part in part_aware()
         for literal in [part.macs + channels // 3 * channels * (size[0] * size[1] - Stripes().parts)]),
    )


def storage() -> str:
    gallery = 19_732
    return markdown(
        ["dimensions", "float32: bytes", "ratio", "int8: bytes", "ratio", "parameters that low rank adds",
         "Market-1501's gallery in float32", "in int8"],
        ([dims, 4 * dims, f"{768 / dims:.4g}x", dims, f"{4 * 768 / dims:.4g}x", 2 * 768 * dims if dims < 768 else "-",
          f"{gallery * 4 * dims / 1e6:.3g} MB", f"{gallery * dims / 1e6:.3g} MB"]
         for dims in (768, 576, 480, 384, 192, 64, 32)),
    )


def recipes() -> str:
    """The recipes that follow a paper, those that are equal in one row."""
    names: dict[Recipe, list[str]] = {}
    for name, recipe in RECIPES.items():
        if name.startswith(("safr", "robust-reid", "dare", "autoreid")):
            names.setdefault(recipe, []).append(f"`{name}`")
    lines = []
    for r, alike in names.items():
        steps = {"cosine": "cosine", "step": f"x {r.gamma:g} at {', '.join(map(str, r.milestones))}",
                 "exponential": f"to x {r.gamma:g} from {r.milestones[0]} on"}[r.schedule]
        smoothing = "literal smoothing" if r.literal_smoothing else f"smoothing {r.label_smoothing:g}"
        losses = [f"{r.ce_weight:g} CE, {smoothing}",
                  f"{r.triplet_weight:g} {r.triplet}, " + ("soft margin" if r.soft_margin else f"margin {r.margin:g}"),
                  f"{r.center_weight:g} center"]
        weights = (r.ce_weight, r.triplet_weight, r.center_weight)
        epochs = f"{r.epochs}" + f" + {r.swag_cycles} x {r.swag_epochs} SWAG" * bool(r.swag_cycles)
        lines.append([", ".join(alike), "x".join(map(str, r.input)), f"{r.identities} x {r.images}",
                      f"{r.optimizer}, {r.lr:g}, decay {r.weight_decay:g}", f"warm-up {r.warmup_epochs}, {steps}", epochs,
                      "; ".join(words for words, weight in zip(losses, weights, strict=True) if weight),
                      f"flip {r.flip:g}, erase {r.erase:g}, pad {r.pad}, enlarge {r.enlarge:g}", r.views])
    return markdown(["recipe", "input", "batch", "optimiser, rate", "schedule (epochs)", "epochs", "losses", "augmentation",
                     "views"], lines)


# ---------------------------------------------------------------------------------------- claims
def ok(holds: bool, words: str = "") -> str:
    return ("ok" if holds else "**false**") + (f": {words}" if words else "")


def claims() -> str:
    """Every claim of the papers that needs no dataset: by the paper's own figures, then by ours."""
    large, medium, small, micro = (count(f"safr-{size}", "", SQUARE) for size in ("large", "medium", "small", "micro"))
    thin = count("safr-large", "dbam_site=out dbam_where=all attention_conv=depthwise", SQUARE)
    dense = count("safr-micro", "attention_conv=dense", SQUARE)
    bot = count("resnet50", "last_stride=1 neck=none", USUAL)
    r50, one, two = count("resnet50", "neck=none", USUAL), *(count(f"robust-reid-{n}x", "", LOW) for n in (1, 2))
    dare = count("dare-r50", "", USUAL).params
    bases = [count(name, "neck=none", USUAL).params for name in ("resnet50", "densenet201")]
    swag = RECIPES["robust-reid-swag"]
    cycles = swag.swag_cycles * swag.swag_epochs
    shares = [(part.params / sep.params, part.macs / sep.macs) for *_, sep, part in part_aware()]
    low, high = zip(*((min(column), max(column)) for column in zip(*shares, strict=True)), strict=True)

    def drop(before: float, after: float) -> float:
        return 100 * (1 - after / before)

    rows = [
        ("SAFR", "Micro is '33x', 'about 34 times' or '3362 %' faster than Large",
         f"4.5 / 0.13 = {4.5 / 0.13:.1f}x, an increase of {100 * (4.5 / 0.13 - 1):.0f} %; ours "
         f"{large.macs / micro.macs:.1f}x as built, {large.macs / dense.macs:.1f}x with dense attention in both, "
         f"{thin.macs / micro.macs:.1f}x with depthwise",
         ok(round(100 * (4.5 / 0.13 - 1)) == 3362, "as an increase, of the paper's figures")),
        ("SAFR", "Micro is 95 % smaller than Large; 6 MB",
         f"1 - 1.5 / 30 = {drop(30, 1.5):.0f} %, 1.5 M x 4 bytes = 6 MB; ours {drop(large.params, micro.params):.1f} %, "
         f"{4 * micro.params / 1e6:.1f} MB", ok(drop(30, 1.5) == 95)),
        ("SAFR", "Small: 60 % smaller, 150 % faster; Medium: 30 %, 18 %",
         f"{drop(30, 12):.0f} %, {100 * (4.5 / 1.8 - 1):.0f} %; {drop(30, 21):.0f} %, {100 * (4.5 / 3.8 - 1):.0f} %; ours "
         f"{drop(large.params, small.params):.0f} %, {100 * (large.macs / small.macs - 1):.0f} %; "
         f"{drop(large.params, medium.params):.0f} %, {100 * (large.macs / medium.macs - 1):.0f} %",
         ok(round(drop(30, 12)) == 60 and round(100 * (4.5 / 3.8 - 1)) == 18, "of the paper's figures")),
        ("SAFR", "mAP of Medium, Small, Micro drops by 2.5, 5.2, 6.8 %",
         "relative " + ", ".join(f"{drop(81.34, v):.2f}" for v in (79.34, 77.14, 75.80)) + " %; "
         + ", ".join(f"{81.34 - v:.2f}" for v in (79.34, 77.14, 75.80)) + " points",
         ok([f"{drop(81.34, v):.1f}" for v in (79.34, 77.14, 75.80)] == ["2.5", "5.2", "6.8"], "as relative drops")),
        ("SAFR", "rank-1 of Medium drops by 2.7 %", f"96.93 to 93.34: {drop(96.93, 93.34):.1f} %; Micro's 4.5 % holds "
         f"({drop(96.93, 92.61):.1f} %)", ok(round(drop(96.93, 93.34), 1) == 2.7)),
        ("SAFR", "Micro is over 100x smaller and faster than related work",
         f"110 to 350 M / 1.5 M = {110 / 1.5:.0f} to {350 / 1.5:.0f}x; 11 to 20 G / 0.13 G = {11 / 0.13:.0f} to "
         f"{20 / 0.13:.0f}x",
         "partly: not than every row of its Table 2"),
        ("SAFR", "Large is 4x faster and 3x smaller than related work",
         f"11 to 20 G / 4.5 G = {11 / 4.5:.1f} to {20 / 4.5:.1f}x; 110 M / 30 M = {110 / 30:.1f}x and more",
         "partly: 4x of the slowest alone; 3x holds"),
        ("Robust-ReID", "the ResNet-50 of Bag of Tricks takes 4.1 B FLOPs",
         f"ours {bot.macs:,} MACs at 256x128 with last stride 1", ok(f"{bot.macs / 1e9:.1f}" == "4.1")),
        ("Robust-ReID", "an order of magnitude smaller than the best model",
         f"25 / 6.4 = {25 / 6.4:.1f}x, 25 / 2.9 = {25 / 2.9:.1f}x; ours {r50.params / two.params:.1f}x, "
         f"{r50.params / one.params:.1f}x", ok(25 / 6.4 >= 10, "overstated")),
        ("Robust-ReID", "SWAG adds 15 x 35 = 525 epochs; the tricks +2.0 rank-1, +6.3 mAP; without L2 -1.2, -2.4",
         f"{swag.swag_cycles} x {swag.swag_epochs} = {cycles}; {93.2 - 91.2:.1f}, {82.0 - 75.7:.1f}; {95.7 - 94.5:.1f}, "
         f"{88.1 - 85.7:.1f}", ok(cycles == 525)),
        ("Auto-ReID", "'less than 40 % parameters of the reID baselines'", f"13.1 / 25.1 = {100 * 13.1 / 25.1:.0f} %",
         ok(13.1 / 25.1 < 0.4)),
        ("Auto-ReID", "'reducing 50 % parameters and 53 % FLOPs'",
         f"-{drop(25.1, 13.1):.1f} % (-{drop(27.2, 13.1):.1f} % of PCB's 27.2 M); -{drop(3.8, 2.05):.0f} % FLOPs",
         "partly: parameters nearly, FLOPs **false** (54 % are what remains)"),
        ("Auto-ReID", "more than 45 % fewer parameters than ResNet-50", f"{drop(25.1, 13.1):.1f} %",
         ok(drop(25.1, 13.1) > 45)),
        ("Auto-ReID", "the part-aware module costs about as much as a separable convolution",
         f"ours over two separable ones: {low[0]:.2f} to {high[0]:.2f} of the parameters, {low[1]:.2f} to {high[1]:.2f} of "
         "the MACs", "partly: more parameters, fewer MACs; the paper gives no width"),
        ("DaRe", "TriNet has 'a similar number of parameters'",
         f"{dare / 1e6:.2f} M and {trinet().params / 1e6:.2f} M, {100 * (dare / trinet().params - 1):+.1f} %",
         "ok, loosely"),
        ("DaRe", "ResNet-50 and DenseNet-201 'have similar number of parameters'",
         f"{bases[0] / 1e6:.1f} M and {bases[1] / 1e6:.1f} M, {100 * (bases[0] / bases[1] - 1):+.0f} %",
         "ok, loosely"),
        ("Compression", "embeddings compressed by up to 96x", f"768 x 4 bytes / (32 x 1 byte) = {768 * 4 // 32}",
         ok(768 * 4 / 32 == 96, "without the scale and zero point")),
        ("Compression", "retraining by 20 % a step doubles the training 'for the largest compression ratio'",
         "576, 480, 384, 192, 64: 5 steps, +100 %; 32: 6 steps, +120 %", "partly: true of 64, as its Discussion says"),
        ("Auto-ReID", "MSMT17: +12 mAP, +10 rank-1 over PCB; +2.3 mAP with re-ranking",
         f"{52.5 - 40.4:.1f}, {78.2 - 68.2:.1f}, {94.2 - 91.9:.1f}", ok(round(94.2 - 91.9, 1) == 2.3)),
        ("DaRe, Auto-ReID", "the splits of MARS, Market-1501 and MSMT17 add up",
         f"509,914 + 681,089 = {509_914 + 681_089:,}; 12,936 + 19,732 = {12_936 + 19_732:,}; 32,621 + 93,820 = "
         f"{32_621 + 93_820:,}, 11,659 + 82,161 = {11_659 + 82_161:,}",
         ok((509_914 + 681_089, 12_936 + 19_732, 11_659 + 82_161) == (1_191_003, 32_668, 93_820))),
    ]
    return markdown(["paper", "claim", "check", "verdict"], rows)


# ---------------------------------------------------------------------------------------- all of it
def tables() -> dict[str, str]:
    """Heading to Markdown table, in the document's order."""
    found = {heading: table(rows, extra) for heading, (rows, extra) in COMMON.items()}
    found["DaRe, exit by exit"] = dare_exits()
    found["DaRe, whole networks"] = dare_networks()
    found["The part-aware module beside two separable convolutions"] = part_aware_table()
    found["The size of an embedding"] = storage()
    found["Claims that need no dataset"] = claims()
    found["What the recipes say"] = recipes()
    return found


def updated(text: str, found: Mapping[str, str]) -> str:
    """The document with the table under each heading put anew."""
    for heading, new in found.items():
        pattern = rf"(^#+ {re.escape(heading)}\n(?:(?![#|]).*\n)*)(?:\|.*\n)*"
        text, times = re.subn(pattern, lambda match, new=new: f"{match[1]}{new}\n", text, flags=re.M)
        if times != 1:
            raise SystemExit(f"the heading '{heading}' stands {times} times in the document; it must stand there once")
    return text


def records() -> list[dict]:
    return [
        {"name": row.label.replace("`", ""), "table": heading, "input": row.size, "paper_params": row.params,
         "paper_flops": row.flops, "params": row.cost.params, "macs": row.cost.macs, "macs_all": row.cost.macs_all}
        for heading, (rows, _) in COMMON.items() for row in rows
    ] + [
        {"name": f"{name}, exit {number}", "table": "DaRe, exit by exit", "input": USUAL,
         "macs": count(name, "", USUAL, exit_number=number).macs}
        for name in ("dare-r50", "dare-d201") for number in (1, 2, 3, 4)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", metavar="FILE.md", help="put the tables into this document instead of printing them")
    parser.add_argument("--json", metavar="FILE", help="also write the rows of the networks here")
    chosen = parser.parse_args()
    found = tables()
    if chosen.update:
        Path(chosen.update).write_text(updated(Path(chosen.update).read_text(), found))
    else:
        print("\n\n".join(f"### {heading}\n\n{text}" for heading, text in found.items()))
    if chosen.json:
        record = {
            "command": shlex.join(["python", "benchmarks/reproduction.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__},
            "rows": records(),
        }
        Path(chosen.json).parent.mkdir(parents=True, exist_ok=True)
        Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

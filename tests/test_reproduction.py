"""docs/reproduction.md says what benchmarks/reproduction.py prints, its commands and options exist, and every network of
the papers has its exact size and cost under its name.
"""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from autoreid.cli import build_parser
from autoreid.errors import UserError
from autoreid.network import find_model, known_models
from autoreid.options import split_pairs
from autoreid.recipe import Recipe, find_recipe
from autoreid.search import find_settings

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "reproduction.md").read_text()


def load():
    spec = importlib.util.spec_from_file_location("reproduction", ROOT / "benchmarks" / "reproduction.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduction"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


reproduction = load()
SQUARE, LARGE, LOW, TALL, USUAL = (224, 224), (350, 350), (160, 64), (384, 128), (256, 128)


# ---------------------------------------------------------------------------------------- the names and their integers
AUTHORS = "dbam_site=out dbam_where=first mask=soft"
OUTPUTS = "dbam_site=out dbam_where=all"
NO_ATTENTION = "global_attention=false local_attention=false"
COUNTS = [  # name, options, input, classes, parameters, MACs
    # Auto-ReID, its Tables 1 and 4: a 751-way classifier, no neck
    ("resnet18", "neck=none", TALL, 751, 11_561_775, 1_776_934_400),
    ("resnet34", "neck=none", TALL, 751, 21_669_935, 3_588_873_728),
    ("resnet50", "neck=none", TALL, 751, 25_046_831, 4_005_263_360),
    ("autoreid-baseline", "neck=none", TALL, 751, 11_841_199, 2_029_328_384),
    ("autoreid-baseline-reid", "neck=none", TALL, 751, 10_972_847, 1_679_630_928),
    ("autoreid-retrieval-reid", "neck=none", TALL, 751, 11_409_519, 1_828_097_320),
    ("darts-v2", "neck=none", TALL, 751, 9_016_367, 1_689_344_000),
    ("darts-v2", "stem=conv neck=none", TALL, 751, 9_053_359, 1_802_590_208),
    ("darts-v2", "stem=conv neck=none embedding_dim=512", TALL, 751, 8_948_911, 1_802_485_248),
    ("gdas-v1", "neck=none", TALL, 751, 13_457_839, 2_141_247_488),
    ("gdas-v1", "stem=conv neck=none", TALL, 751, 13_494_831, 2_254_493_696),
    # SAFR, its Table 2
    ("resnet50", "neck=none", SQUARE, 1000, 25_557_032, 4_089_184_256),
    ("safr-baseline", "", SQUARE, 0, 23_512_128, 4_087_136_256),
    ("safr-baseline", "", LARGE, 0, 23_512_128, 10_089_422_016),
    ("safr-large", "", SQUARE, 0, 29_853_696, 5_936_824_320),
    ("safr-large", "", LARGE, 0, 29_853_696, 14_631_140_544),
    ("safr-large", AUTHORS, SQUARE, 0, 24_773_696, 8_711_372_800),
    ("safr-large", AUTHORS, LARGE, 0, 24_773_696, 21_482_552_512),
    ("safr-large", f"{OUTPUTS} attention_conv=depthwise", SQUARE, 0, 23_800_256, 4_200_935_424),
    ("safr-large", f"{OUTPUTS} attention_conv=depthwise", LARGE, 0, 23_800_256, 10_370_031_936),
    ("safr-medium", "", SQUARE, 0, 21_288_064, 3_681_312_768),
    ("safr-medium", "", LARGE, 0, 21_288_064, 9_086_882_112),
    ("safr-medium", "attention_conv=dense", SQUARE, 0, 21_433_216, 4_819_304_448),
    ("safr-medium", "attention_conv=dense", LARGE, 0, 21_433_216, 11_871_550_656),
    ("safr-small", "", SQUARE, 0, 11_179_904, 1_831_624_704),
    ("safr-small", "", LARGE, 0, 11_179_904, 4_519_285_056),
    ("safr-small", "attention_conv=dense", SQUARE, 0, 11_325_056, 2_969_616_384),
    ("safr-small", "attention_conv=dense", LARGE, 0, 11_325_056, 7_303_953_600),
    ("safr-micro", "", SQUARE, 0, 1_404_082, 162_324_496),
    ("safr-micro", "attention_conv=dense", SQUARE, 0, 1_431_082, 287_639_056),
    ("safr-micro", NO_ATTENTION, SQUARE, 0, 1_403_110, 156_679_696),
    ("safr-micro", f"{NO_ATTENTION} projection=after", SQUARE, 0, 1_403_110, 131_120_656),
    # its Figure 5: the neck's weight, weight and bias; two convolutions; eight and their masks
    ("safr-fig5-baseline", "", SQUARE, 0, 23_508_032, 4_087_136_256),
    ("safr-fig5-batch-norm", "", SQUARE, 0, 23_508_032 + 2048, 4_087_136_256),
    ("safr-fig5-layer-norm", "", SQUARE, 0, 23_508_032 + 4096, 4_087_136_256),
    ("safr-fig5-global", "", SQUARE, 0, 23_508_032 + 73_728, 4_087_136_256 + 73_728 * 112 * 112),
    ("safr-fig5-local", "", SQUARE, 0, 23_508_032 + 6_266_880 + 960, 5_011_980_288),
    ("safr-fig5-all", "", SQUARE, 0, 29_853_696, 5_936_824_320),
    # Robust-ReID, its Tables 1 and 2
    ("ha-cnn", "", LOW, 0, 2_929_112, 543_994_538),
    ("robust-reid-1x", "", LOW, 0, 2_928_408, 682_665_130),
    ("robust-reid-2x", "", LOW, 0, 5_785_371, 1_621_772_618),
    ("robust-reid-a", "", LOW, 0, 2_929_112, 543_994_538),
    ("robust-reid-b", "", LOW, 0, 5_785_371, 1_621_772_618),
    ("robust-reid-c", "", LOW, 0, 5_627_087, 1_238_042_570),
    ("robust-reid-d", "", LOW, 0, 5_785_371, 1_621_772_618),
    ("robust-reid-e", "", LOW, 0, 5_785_371 - 960, 1_621_772_618),
    ("robust-reid-f", "", LOW, 0, 2_928_408, 682_665_130),
    ("robust-reid-g", "", LOW, 0, 2_928_408, 682_665_130),
    ("robust-reid-h", "", LOW, 0, 5_785_371, 1_621_772_618),
    ("robust-reid-full", "", LOW, 0, 5_785_371, 1_621_772_618),
    ("resnet50", "last_stride=1 neck=none", USUAL, 0, 23_508_032, 4_053_270_528),
    # DaRe with all its heads
    ("dare-r50", "", USUAL, 0, 27_977_284, 2_669_150_208 + 393_216 + 655_360 + 1_179_648 + 2_228_224),
    ("dare-d201", "", USUAL, 0, 23_222_660, 2_801_270_784 + 393_216 + 655_360 + 1_966_080 + 2_097_152),
    # Embedding Compression's encoder: 129 and 197 tokens; as built a BNNeck, whose shift does not learn
    ("vit-b16", "neck=none", USUAL, 0, 85_746_432, 11_338_795_008),
    ("vit-b16", "", USUAL, 0, 85_746_432 + 768, 11_338_795_008),
    ("vit-b16", "embedding=32", USUAL, 0, 85_746_432 + 32, 11_338_795_008),
    ("vit-b16", "grid=14x14 neck=none", SQUARE, 0, 85_798_656, 17_563_060_224),
    ("vit-b16", "grid=14x14", SQUARE, 0, 85_798_656 + 768, 17_563_060_224),
    # OSNet with its layer of 512
    ("osnet-x1.0", "", USUAL, 0, 2_169_508, 978_875_392),
    ("osnet-x0.75", "", USUAL, 0, 1_285_754, 571_752_192),
    ("osnet-x0.5", "", USUAL, 0, 630_034, 272_899_328),
    ("osnet-x0.25", "", USUAL, 0, 201_864, 82_314_880),
]
UNBIASED = [  # a 1000-way classifier without bias: ShuffleNetV2+ as published
    ("small", 5_137_116, 155_845_008), ("medium", 5_679_840, 222_249_984), ("large", 6_768_220, 360_050_704),
]
TORCHVISION = {  # its ImageNet classifiers, counted by torchvision
    "densenet201": 20_013_928, "shufflenet-v2-x0.5": 1_366_792, "shufflenet-v2-x1.0": 2_278_604,
    "shufflenet-v2-x1.5": 3_503_624, "shufflenet-v2-x2.0": 7_393_996,
}


@pytest.mark.parametrize(("name", "options", "size", "classes", "params", "macs"), COUNTS)
def test_counts(name, options, size, classes, params, macs):
    cost = reproduction.count(name, options, size, classes)
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize(("size", "params", "macs"), UNBIASED)
def test_shufflenet_v2_plus_as_published(size, params, macs):
    cost = reproduction.count(f"shufflenet-v2-plus-{size}", "tail=published neck=none", SQUARE, 1000, False)
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_with_their_classifier(name):
    assert reproduction.count(name, "neck=none", SQUARE, 1000).params == TORCHVISION[name]


# the paper's 0.72 and 1.68 B count no biases of linear layers: hard attention's 3 x 8, and those of the two layers
@pytest.mark.parametrize(("name", "theirs", "biases"), [
    ("robust-reid-1x", 716_729_298, 3 * 8 + 2 * 512), ("robust-reid-2x", 1_680_592_374, 3 * 8 + 2 * 960),
])
def test_robust_reids_convention(name, theirs, biases):
    assert reproduction.count(name, "", LOW).macs_all == theirs + biases


@pytest.mark.parametrize(("name", "params", "exits"), [
    ("dare-r50", 27_977_284, (513_671_168, 1_185_021_952, 2_141_847_552, 2_671_378_432)),
    ("dare-d201", 23_222_660, (756_940_800, 1_289_879_552, 2_377_515_008, 2_803_367_936)),
])
def test_dares_exits(name, params, exits):
    costs = [reproduction.count(name, "", USUAL, exit_number=number) for number in (1, 2, 3, 4)]
    assert tuple(cost.macs for cost in costs) == exits and {cost.params for cost in costs} == {params}


@pytest.mark.parametrize(("name", "heads"), [
    ("dare-r50", (393_216, 655_360, 1_179_648, 2_228_224)), ("dare-d201", (393_216, 655_360, 1_966_080, 2_097_152)),
])
def test_dares_heads(name, heads):
    assert tuple(reproduction.head_macs(name, number) for number in (1, 2, 3, 4)) == heads


def test_what_else_the_program_counts():
    assert reproduction.caffe_exits() == (517_079_040, 1_139_933_184, 2_047_737_856, 2_527_297_536)
    assert reproduction.trinet().params == 23_508_032 + 2048 * 1024 + 1024 + 2 * 1024 + 1024 * 128 + 128
    # two part-aware modules in each of three reduction cells: a third of C to C, at every place but once a stripe
    extra = sum(2 * (c // 3) * c * (places - 4) for c, places in ((128, 48 * 16), (256, 24 * 8), (512, 12 * 4)))
    assert reproduction.literal_extra("autoreid-baseline-reid", "", TALL) == extra
    assert reproduction.literal_extra("darts-v2", "", TALL) == 0
    assert [(sep.params, sep.macs) for *_, sep, _ in reproduction.part_aware()] == [
        (9_600, 28_704_768), (35_584, 26_935_296), (136_704, 26_050_560), (535_552, 25_608_192)
    ]


# ---------------------------------------------------------------------------------------- figures and verdicts
@pytest.mark.parametrize(("text", "ours", "matches", "difference"), [
    ("26 M", 25_557_032, True, -1.7), ("26 M", 25_499_999, False, -1.9), ("4 G", 4_499_999_999, True, 12.5),
    ("0.72 G", 716_730_346, True, -0.5), ("0.72 G", 714_999_999, False, -0.7), ("156 M", 155_845_008, True, -0.1),
    ("523,568,640", 523_568_640, True, 0.0), ("523,568,640", 513_671_168, False, -1.9),
])
def test_a_printed_figure(text, ours, matches, difference):
    figure = reproduction.Figure(text)
    assert figure.matches(ours) is matches and round(figure.difference(ours), 1) == difference


@pytest.mark.parametrize(("params", "macs", "words"), [
    (26_000_000, 4_000_000_000, "both match: why"), (26_000_000, 5_000_000_000, "parameters match: why"),
    (1, 4_000_000_000, "FLOPs match: why"), (1, 1, "neither matches: why"), (26_000_000, None, "matches: why"),
    (1, None, "does not match: why"), (None, None, "why"),
])
def test_verdicts(params, macs, words):
    figures = [(what, reproduction.Figure(text), ours) for what, text, ours in
               (("parameters", "26 M", params), ("FLOPs", "4 G", macs)) if ours is not None]
    assert reproduction.judged(figures, "why")[2] == words


# ---------------------------------------------------------------------------------------- the document
@pytest.fixture(scope="module")
def tables():
    return reproduction.tables()


def test_the_document_holds_every_table_as_printed(tables):
    for heading, table in tables.items():
        section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.M | re.S)
        assert section, f"docs/reproduction.md has no heading '### {heading}'"
        assert table in section[1], f"{heading}: run python benchmarks/reproduction.py --update docs/reproduction.md"
    assert reproduction.updated(DOCUMENT, tables) == DOCUMENT


def test_an_outdated_table_is_put_anew_and_a_missing_heading_named(tables):
    heading, table = next(iter(tables.items()))
    assert reproduction.updated(DOCUMENT.replace(table, "| old |"), {heading: table}) == DOCUMENT
    with pytest.raises(SystemExit, match="the heading 'No such' stands 0 times"):
        reproduction.updated(DOCUMENT, {"No such": table})


def test_the_verdicts_on_the_claims(tables):
    rows = [line.split(" | ") for line in tables["Claims that need no dataset"].splitlines()[2:]]
    verdicts = [row[3].split(":")[0].split(",")[0].rstrip(" |") for row in rows]
    assert verdicts == ["ok"] * 4 + ["**false**"] + ["partly"] * 2 + ["ok", "**false**", "ok", "**false**", "partly", "ok",
                        "partly", "ok", "ok", "ok", "partly", "ok", "ok"]


def test_the_record(tables, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "reproduction.json"
    monkeypatch.setattr(sys, "argv", ["reproduction.py", "--json", str(path)])
    monkeypatch.setattr(reproduction, "tables", lambda: tables)
    assert reproduction.main() == 0
    record = json.loads(path.read_text())
    assert set(record) == {"command", "machine", "versions", "rows"}
    large = next(row for row in record["rows"] if row["name"] == "safr-large")
    assert (large["paper_params"], large["params"], large["macs"]) == ("30 M", 29_853_696, 5_936_824_320)
    assert all(f"### {heading}\n\n{table}" in capsys.readouterr().out for heading, table in list(tables.items())[:1])


CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", DOCUMENT, flags=re.M | re.S))
COMMANDS = sorted({code for code in CODE if code.startswith("autoreid ")})
OPTIONS = sorted({code for code in CODE if " --set " in code and code.split()[0] in known_models()})
ALONE = sorted({code for code in CODE if code.startswith("--set ")})
SHORTENED = {"autoreid cost NAME... --input HxW --no-latency --json"}


def accepts(model: str, changes: dict, recipe: str | None) -> None:
    """The model can be built and the recipe be found with these changes, each of which one of the two must know."""
    for_recipe = {key: changes.pop(key) for key in list(changes) if key in Recipe.__dataclass_fields__}
    with torch.device("meta"):
        find_model(model, changes).build()
    find_recipe(recipe or "default", for_recipe)


def test_there_is_something_to_test():
    assert len(COMMANDS) > 30 and len(OPTIONS) > 15 and len(ALONE) > 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in SHORTENED])
def test_every_command_is_accepted(command):
    args = build_parser().parse_args(shlex.split(command)[1:])
    changes = split_pairs(args.changes)
    if args.command in ("retrain", "compress"):
        searched = args.model.startswith("searches/")  # a network that the command before it finds
        accepts("random-reid" if searched else args.model, changes, args.recipe)
    elif args.command == "search":
        find_settings(args.preset, {**changes, "arch_loss": args.arch_loss})
    else:
        assert args.command == "density" and all(name in known_models() for name in args.models)


@pytest.mark.parametrize("text", OPTIONS)
def test_every_option_exists(text):
    name, *rest = text.split(" --set ")
    accepts(name, split_pairs(rest), None)


@pytest.mark.parametrize("text", ALONE)
def test_every_option_named_without_a_model_exists(text):
    accepts("darts-v2", split_pairs(text.removeprefix("--set ").split(" --set ")), None)


def test_an_option_that_does_not_exist_is_found():
    with pytest.raises(UserError, match="unknown option of safr-large 'maks'"):
        accepts("safr-large", {"maks": "soft"}, None)


def test_every_recipe_named_exists():
    named = set(re.findall(r"--recipe ([\w-]+)", DOCUMENT)) - {"NAME"}
    assert len(named) > 12
    for name in named:
        find_recipe(name)

"""Exported networks: the same numbers, for every model; what the file says; what is refused and left undone.

On a few pictures whose identity is a colour (``planted``) and small networks. The whole zoo in all formats is slow.
"""

import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from safetensors import safe_open
from test_models import NETWORKS, settle, small, small_size
from torch import nn

from autoreid import data, export, runtimes
from autoreid.cli import main
from autoreid.compare import format_table, read_results, table
from autoreid.cost import measure
from autoreid.errors import UserError
from autoreid.export import Graph, Plan, describe, parity, write
from autoreid.heads import ReIDNet
from autoreid.loading import IMAGENET_MEAN, IMAGENET_STD, load_images, normalise
from autoreid.network import find_model, load_weights, save_weights
from autoreid.runtimes import FORMATS, find_format, open_exported, pixels

SIZE = (32, 16)
# one of each structure; torch.export is where a network's code can fail all three formats
FAMILIES = ["shufflenet-v2-x0.5", "vit-b16", "safr-small", "ha-cnn", "dare-r50", "random-reid"]
NEEDS = {name: pytest.mark.skipif(importlib.util.find_spec(found.runtime) is None, reason=f"no {found.runtime}")
         for name, found in FORMATS.items()}
ALL = [pytest.param(name, marks=NEEDS[name]) for name in FORMATS]


def said(size=SIZE, **more):
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input": list(size), "resize": "bilinear, antialiased",
            "model": {"label": "small"}, **more}


def exported(net, plan, folder, size=SIZE, pictures=None):
    """The file of a net, opened, and its graph."""
    graph = Graph(net, plan, IMAGENET_MEAN, IMAGENET_STD, size)
    path = folder / f"net{FORMATS[plan.format].ending}"
    write(graph, plan, path, describe(plan, graph, net, said(size)), pictures)
    return open_exported(path), graph


def random_pictures(count, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, *size), dtype=np.uint8))


class Odd(nn.Module):
    """A backbone of one layer and one operation of the test's choice."""

    channels, stage_channels = 4, (4,)

    def __init__(self, operation=torch.relu):
        super().__init__()
        self.layer, self.operation = nn.Conv2d(3, 4, 3), operation

    def forward(self, images):
        return self.operation(self.layer(images))


def tiny():
    net = ReIDNet(Odd())
    settle(net, normalise(random_pictures(16)))
    return net.eval()


def trained_a_little(name="resnet18", options=None, size=SIZE):
    """A net whose batch norms have seen pictures."""
    net = find_model(name, {"stem": 3, "width": 6} if options is None else options).build()
    settle(net, normalise(random_pictures(16, size)))
    return net.eval()


# ---------------------------------------------------------------------------------------- the same numbers
def check_model(name, format, folder, **options):
    size = small_size(name)
    net = trained_a_little(name, small(name) | options, size)
    file, graph = exported(net, Plan(format), folder, size)
    pictures = random_pictures(3, size, seed=1)
    with torch.no_grad():
        wanted = net(normalise(pictures))
    for count in (1, 3):  # neither is the batch of 2 that it was traced with
        found = file(normalise(pictures[:count]))
        assert found.shape == (count, net.dims)
        row = parity(file, graph, pictures[:count], count)
        export.require_parity([row], Plan(format), own=export.own_difference(graph, pictures))
        assert row["largest"] > 0.1 and row["min_cosine"] > 0.99999
    return (found - wanted).abs().max().item(), wanted.abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports(name, tmp_path):
    check_model(name, "torch-export", tmp_path, **({"layers": "1,1"} if name == "random-reid" else {}))


@pytest.mark.parametrize(("name", "format"), [
    pytest.param(name, format, marks=NEEDS[format]) for name, format in (("dare-r50", "onnx"), ("safr-small", "openvino"))
])
def test_families_in_the_other_formats(name, format, tmp_path):
    check_model(name, format, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_model_exports_in_every_format(name, format, tmp_path, record_property):
    difference, largest = check_model(name, format, tmp_path)
    record_property("difference", difference)
    record_property("largest", largest)


@pytest.mark.parametrize("format", ALL)
def test_normalisation_inside_is_the_same_as_outside_and_the_file_says_which(format, tmp_path):
    net, pictures = tiny(), random_pictures(5, seed=2)
    with torch.no_grad():
        wanted = net(normalise(pictures))
    headers = []
    for inside in (False, True):
        file, _ = exported(net, Plan(format, inside=inside), tmp_path)
        headers.append(file.header)
        for images in (pictures, normalise(pictures)):  # whichever it takes, the other is turned into it
            torch.testing.assert_close(file(images), wanted, rtol=1e-4, atol=1e-4)
        assert file.prepared(pictures).dtype == (torch.uint8 if inside else torch.float32)
    values = {"range": [0, 1], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    both = {"size": [32, 16], "batch": None, "layout": "BCHW", "colour": "RGB", "resize": "bilinear, antialiased"}
    assert headers[0]["preprocessing"] == {**both, "dtype": "float32", "inside": False, **values}
    assert headers[1]["preprocessing"] == {**both, "dtype": "uint8", "inside": True, "range": [0, 255], "mean": None,
                                           "std": None, "in_graph": values}
    for header in headers:
        assert header["embedding"] == {"dims": 4, "dtype": "float32", "scales": [None], "distance": "euclidean"}


def test_pixels_undoes_normalise_for_every_value():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    assert torch.equal(pixels(normalise(every)), every)


@pytest.mark.parametrize("format", ALL)
def test_a_fixed_batch_is_filled_up(format, tmp_path):
    net, pictures = tiny(), random_pictures(7, seed=3)
    file, _ = exported(net, Plan(format, batch=4), tmp_path)
    assert file.batch == 4
    with torch.no_grad():
        torch.testing.assert_close(file(normalise(pictures)), net(normalise(pictures)), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=r"4|shape|dim"):  # of the runtime: the graph itself has no other
        file.run(normalise(pictures))


@NEEDS["onnx"]
def test_onnx_says_the_size_and_that_the_batch_is_free(tmp_path):
    import onnx

    file, _ = exported(tiny(), Plan("onnx"), tmp_path)
    model = onnx.load(str(file.path))
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 32, 16]
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["images", "embedding"]
    assert json.loads({p.key: p.value for p in model.metadata_props}["autoreid"])["format"] == "autoreid-export"


def test_an_int8_embedding_keeps_its_scale(tmp_path):
    net = find_model("resnet18", {"stem": 3, "width": 6, "int8": True}).build()
    with torch.no_grad():
        net.train().branches(normalise(random_pictures(16)))  # the observers see a batch
    net.eval()
    file, _ = exported(net, Plan("torch-export"), tmp_path)
    assert file.header["embedding"]["scales"] == [net.scale] and net.scale is not None
    pictures = normalise(random_pictures(4, seed=4))
    with torch.no_grad():
        assert torch.equal((file(pictures) / net.scale).round().to(torch.int8), net.codes(pictures))


# ---------------------------------------------------------------------------------------- exits
def exits_net():
    return trained_a_little(options={"stem": 3, "width": 6, "head": "exits", "hidden": 16, "embedding_dim": 8})


@pytest.mark.parametrize("format", ALL)
def test_all_exits(format, tmp_path):
    net, pictures = exits_net(), random_pictures(3, seed=5)
    with torch.no_grad():
        wanted = net.head.exits(list(net.backbone.stages(normalise(pictures))))
    everything, _ = exported(net, Plan(format, exit="all"), tmp_path)
    assert everything.header["outputs"] == ["exit_1", "exit_2", "exit_3", "exit_4"]
    for found, exit in zip(everything.exits(pictures), wanted, strict=True):
        torch.testing.assert_close(found, exit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(everything(pictures), wanted[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_net_cut_at_an_exit_keeps_what_that_needs(number, tmp_path):
    torch.manual_seed(1)
    net, pictures = exits_net(), normalise(random_pictures(2))
    with torch.no_grad():
        wanted = net.head.exits(list(net.backbone.stages(pictures)))[number - 1]
    before = sum(p.numel() for p in net.parameters())
    file, graph = exported(net, Plan("torch-export", exit=number), tmp_path)
    torch.testing.assert_close(file(pictures), wanted, rtol=1e-5, atol=1e-5)
    kept = {name for name, _ in graph.net.named_parameters()}
    if number == 4:
        assert sum(p.numel() for p in graph.parameters()) == before
        return
    assert f"head.stages.{number - 1}.1.weight" in kept and "head.fusion" not in kept
    assert not any(f"head.stages.{later}." in name for name in kept for later in range(number, 4))
    assert not any(f"head.stages.{earlier}." in name for name in kept for earlier in range(number - 1))
    assert not any(name.startswith(f"backbone.layers.{number}.") for name, _ in graph.net.backbone.named_buffers())
    state = torch.export.load(file.path).state_dict
    assert {name.removeprefix("net.") for name in state if name.startswith("net.")} == {
        name for name, _ in (*graph.net.named_parameters(), *graph.net.named_buffers())}


def graph_of(name, plan, size):
    return Graph(find_model(name).build(), plan, IMAGENET_MEAN, IMAGENET_STD, size)


def test_the_cost_of_a_cut_net_is_the_papers():
    """DaRe's multiply-accumulates up to an exit, with its own head (the first two, 256 x 128)."""
    for number, macs in ((1, 513_671_168), (2, 1_185_021_952)):
        plan = Plan("torch-export", exit=number)
        build = partial(graph_of, "dare-r50", plan, (256, 128))
        assert measure(build, (256, 128)).macs == macs


@pytest.mark.parametrize(("options", "exit", "words"), [
    ({}, 1, "--exit 1: this net has no exits; train one with `autoreid retrain MODEL --set head=exits`, or leave --exit "
            "out"),
    ({"head": "exits"}, 5, "--exit 5: the net has 4 exits; allowed: 1 to 4, or all"),
])
def test_exits_that_are_not_there(options, exit, words):
    net = find_model("resnet18", {"stem": 3, "width": 6, **options}).build()
    with pytest.raises(UserError) as fault:
        Graph(net, Plan("onnx", exit=exit), IMAGENET_MEAN, IMAGENET_STD, SIZE)
    assert str(fault.value) == words


# ---------------------------------------------------------------------------------------- what a format cannot say
@pytest.mark.parametrize(("format", "operation", "words"), [
    pytest.param("onnx", torch.special.bessel_j0, "--format onnx has no counterpart of the operation prims.bessel_j0: take "
                 "another format (torch-export, openvino), or a network without it", marks=NEEDS["onnx"]),
    pytest.param("openvino", torch.special.bessel_j0, "--format openvino has no counterpart of the operation "
                 "aten.special_bessel_j0: take another format (onnx, torch-export), or a network without it",
                 marks=NEEDS["openvino"]),
    ("torch-export", lambda x: x if x.sum() > 0 else -x, "--format torch-export: which way the network goes depends on the "
     "values in the pictures"),
])
def test_an_operation_that_the_format_lacks(format, operation, words, tmp_path):
    with pytest.raises(UserError) as fault:
        exported(ReIDNet(Odd(operation)), Plan(format), tmp_path)
    assert str(fault.value).startswith(words) and "\n" not in str(fault.value)


def test_what_a_network_says_itself_is_not_translated(tmp_path):
    def refuse(x):
        raise UserError("this picture is too small")

    with pytest.raises(UserError, match=r"^this picture is too small$"):
        exported(ReIDNet(Odd(refuse)), Plan("torch-export"), tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for format, int8, words in (
        ("onnx", False, "--format onnx needs onnxruntime and onnx and onnxscript, which is not installed: pip install "
                        "'autoreid[onnx]'"),
        ("openvino", True, "--format openvino --int8 needs openvino and nncf, which is not installed: pip install "
                           "'autoreid[openvino]'"),
    ):
        with pytest.raises(UserError) as fault:
            find_format(format, int8)
        assert str(fault.value) == words


def test_formats_and_int8():
    with pytest.raises(UserError, match=r"unknown format 'onx'; did you mean 'onnx'\? known: onnx, openvino, torch-export"):
        find_format("onx")
    with pytest.raises(UserError, match=r"^--format torch-export has no --int8 here; the formats that have are onnx"):
        find_format("torch-export", int8=True)


# ---------------------------------------------------------------------------------------- parity
def test_parity_by_hand(tmp_path):
    """Against a loop over pictures and values, on a file of other weights, at a batch that does not divide."""
    file, _ = exported(tiny(), Plan("torch-export"), tmp_path)
    graph = Graph(tiny(), Plan("torch-export"), IMAGENET_MEAN, IMAGENET_STD, SIZE)
    pictures = random_pictures(7, seed=6)
    found = parity(file, graph, pictures, 3)
    differences, cosines, largest = [], [], []
    for picture in pictures:
        ours = file(normalise(picture[None]))[0].double().tolist()
        theirs = graph.net(normalise(picture[None]))[0].double().tolist()
        differences += [abs(a - b) for a, b in zip(ours, theirs)]
        norms = [sum(v * v for v in values) ** 0.5 for values in (ours, theirs)]
        cosines.append(sum(a * b for a, b in zip(ours, theirs)) / norms[0] / norms[1])
        largest += map(abs, theirs)
    assert found["max_abs_difference"] == pytest.approx(max(differences), rel=1e-4) and max(differences) > 0.1
    assert found["min_cosine"] == pytest.approx(min(cosines), abs=1e-5)
    assert found["mean_cosine"] == pytest.approx(sum(cosines) / 7, abs=1e-5)
    assert found["largest"] == pytest.approx(max(largest), rel=1e-4) and (found["batch"], found["images"]) == (3, 7)


def row(**changes):
    return {"batch": 1, "images": 32, "max_abs_difference": 0.0, "min_cosine": 1.0, "largest": 2.0, **changes}


def test_what_parity_allows():
    check = export.require_parity
    check([row(max_abs_difference=1.9e-3)], Plan("onnx"))
    check([row(max_abs_difference=0.05)], Plan("onnx"), scale=0.05)  # the next code of an int8 embedding
    check([row(max_abs_difference=0.05)], Plan("onnx"), own=0.0125)
    check([row(max_abs_difference=1.0, min_cosine=0.71)], Plan("onnx", int8=True))
    for wrong, plan, least in (
        (row(max_abs_difference=2.1e-3), Plan("onnx"), None), (row(min_cosine=0.998), Plan("onnx"), None),
        (row(min_cosine=float("nan")), Plan("onnx", int8=True), None),
        (row(max_abs_difference=float("nan")), Plan("onnx"), None),
        (row(min_cosine=0.69), Plan("onnx", int8=True), None), (row(min_cosine=0.9), Plan("onnx", int8=True), 0.95),
    ):
        with pytest.raises(UserError, match="^nothing is written: the exported network differs from PyTorch's on 32 train"):
            check([row(), wrong], plan, least=least)


def test_pytorchs_own_difference():
    """Of a net whose output depends on what else is in the batch, by as much as that says."""

    class Batch(nn.Module):
        channels, stage_channels = 3, (3,)

        def forward(self, images):
            return images * 0 + torch.tensor([0.0, 0.25, 0.0]).reshape(3, 1, 1) * len(images)

    graph = Graph(ReIDNet(Batch(), neck="none"), Plan("onnx"), IMAGENET_MEAN, IMAGENET_STD, SIZE)
    assert export.own_difference(graph, random_pictures(5)) == pytest.approx(1.0)
    steady = Graph(tiny(), Plan("onnx"), IMAGENET_MEAN, IMAGENET_STD, SIZE)
    assert export.own_difference(steady, random_pictures(5)) < 1e-5


def test_nan_is_the_worst():
    nan = float("nan")
    for which in (min, max):
        assert export._worse(which, nan, 1.0) != export._worse(which, nan, 1.0)
        assert export._worse(which, 1.0, nan) != export._worse(which, 1.0, nan)
    assert (export._worse(max, 1.0, 2.0), export._worse(min, 1.0, 2.0)) == (2.0, 1.0)


# ---------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def planted_market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("data"), planted.whole, 8, test_identities=4)


@pytest.fixture
def weights(tmp_path):
    """As retrain leaves them, in the dataset's folder of results."""
    torch.manual_seed(0)
    spec, net = find_model("resnet18", {"stem": 3, "width": 6}), trained_a_little()
    path = tmp_path / "results" / "market" / f"{spec.label}-s0.safetensors"
    origin = {"trained_on": "market", "train_part": "train", "train_images": 64, "train_unreadable": 0,
              "train_fingerprint": "f", "recipe": "r", "seed": 0, "init": "scratch", "batch_parts": 1}
    save_weights(path, net, spec, input=[32, 16], mean=IMAGENET_MEAN, std=IMAGENET_STD, resize="bilinear, antialiased",
                 dataset="market", recipe="r", seed=0, init="scratch", name=spec.label, origin=origin, epochs=1)
    return path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format", ALL)
def test_the_command_and_its_row_beside_pytorchs(format, weights, planted_market, tmp_path, capsys):
    arguments = ["--root", str(planted_market)]
    assert main(["export", str(weights), "--format", format, *arguments, "--images", "40", "--json"]) == 0
    out, said = capsys.readouterr()
    record = json.loads(out)
    file = weights.with_suffix(FORMATS[format].ending)
    assert json.loads(Path(f"{file}.json").read_text()) == record
    assert [row["batch"] for row in record["parity"]] == [1, 16]
    for found in record["parity"]:
        assert found["images"] == 40 and found["max_abs_difference"] < 1e-4 and found["min_cosine"] > 0.99999
    assert record["latency_ms"].keys() == {"exported", "pytorch"}
    assert record["latency_ms"]["exported"]["threads"] == record["runtime"]["threads"] == torch.get_num_threads()
    assert record["evaluation"]["mAP_drop"] == pytest.approx(0, abs=1e-6) and record["evaluation"]["mAP"] > 0
    assert f"next: autoreid compare {weights.parent}" in said.replace(str(Path.cwd()), "")
    with safe_open(weights, "pt"):
        torch.testing.assert_close(
            open_exported(file)(random_pictures(2)), load_weights(weights)[0](normalise(random_pictures(2))).detach(),
            rtol=1e-4, atol=1e-4)

    name = f"resnet18-stem3-width6-{format}"
    result = json.loads((weights.parent / f"{name}-s0.json").read_text())
    assert result["model"] == name and result["seed"] == 0 and result["export"]["file"]["bytes"] == sum(
        path.stat().st_size for path in export.files_of(file)[:-1])
    plain = ["evaluate", str(weights), "--dataset", "market", *arguments, "--out", str(weights.parent / "pytorch.json")]
    assert main(plain) == 0
    rows = table(read_results(weights.parent))
    assert set(rows["model"]) == {name, "resnet18-stem3-width6"}
    assert rows["latency_on"].nunique() == 1 and rows["latency_on"][0].endswith("1 thread")
    assert rows.set_index("model")["file_bytes"].notna().to_dict() == {name: True, "resnet18-stem3-width6": False}
    assert rows["mAP_mean"][0] == pytest.approx(rows["mAP_mean"][1], abs=1e-6)
    assert "file MB" in format_table(rows)

    assert main(["export", str(weights), "--format", format, *arguments]) == 2  # it is there
    assert "is there already: add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("format", [p for p in ALL if p.values[0] != "torch-export"])
def test_int8_is_calibrated_on_training_images_only(format, weights, planted_market, tmp_path, monkeypatch):
    opened, asked = [], []
    real_images, real_load = export.load_images, data.load

    def look(samples, size):
        opened.extend(samples)
        return real_images(samples, size)

    def load(name, root, parts=data.PARTS):
        asked.append(parts)
        return real_load(name, root, parts)

    monkeypatch.setattr(export, "load_images", look)
    monkeypatch.setattr(data, "load", load)
    out = tmp_path / f"small{FORMATS[format].ending}"
    path, record, result = export.export(weights, Plan(format, int8=True), out=out, root=str(planted_market), images=32,
                                         evaluate=False)
    assert asked == [("train",)] and result is None
    assert len(opened) == 32 and all("bounding_box_train" in sample.path for sample in opened)
    assert record["calibration"] == {"dataset": "market", "part": "train", "images": 32} and record["int8"]
    assert 0.7 <= record["parity"][0]["min_cosine"] < 0.99999  # it is int8 indeed
    assert record["file"]["bytes"] < 0.75 * weights.stat().st_size
    assert open_exported(path).header["int8"] and len({s.identity for s in opened}) == 8  # spread over all


def test_a_file_that_differs_is_not_left_behind(weights, planted_market, monkeypatch, capsys):
    real = export.write

    def another(graph, plan, path, header, pictures):
        torch.manual_seed(5)
        real(Graph(trained_a_little(), plan, IMAGENET_MEAN, IMAGENET_STD, SIZE), plan, path, header, pictures)

    monkeypatch.setattr(export, "write", another)
    before = files(weights.parent)
    assert main(["export", str(weights), "--format", "torch-export", "--root", str(planted_market)]) == 2
    said = capsys.readouterr().err
    assert "nothing is written: the exported network differs from PyTorch's on 64 training images, 1 at a time, by" in said
    assert files(weights.parent) == before


def test_a_failed_overwrite_keeps_the_old_file(weights, planted_market, monkeypatch):
    command = ["export", str(weights), "--format", "torch-export", "--root", str(planted_market)]
    assert main([*command, "--no-evaluate"]) == 0
    before = {path.name: path.read_bytes() for path in weights.parent.iterdir()}

    def fails(*_):
        raise UserError("no")

    monkeypatch.setattr(export, "write", fails)
    assert main([*command, "--overwrite"]) == 2
    assert {path.name: path.read_bytes() for path in weights.parent.iterdir()} == before


@pytest.mark.parametrize(("options", "words"), [
    (["--format", "onnx", "--exit", "1"], "--exit 1: this net has no exits"),
    (["--format", "torch-export", "--images", "8"], "--images 8: give at least 32, so that the file is judged by enough"),
    (["--format", "torch-export", "--images", "40", "--batch", "50"], "--images 40: give at least 50"),
    (["--format", "torch-export", "--batch", "0"], "'0' is no batch size: give a number from 1, or dynamic"),
    (["--format", "torch-export", "--exit", "last"], "'last' is no exit: give a number from 1, or all"),
    (["--format", "torch-export", "--out", "net.onnx"], "--out net.onnx: give the name of a .pt2 file"),
    (["--format", "torch-export", "--min-cosine", "2"], "--min-cosine 2.0: a cosine lies between -1 and 1"),
    (["--format", "tflite"], "unknown format 'tflite'"),
])
def test_mistakes(options, words, weights, planted_market, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = files(weights.parent)
    assert main(["export", str(weights), "--root", str(planted_market), *options]) == 2
    assert words in capsys.readouterr().err and files(weights.parent) == before


def test_where_results_go(tmp_path):
    weights = tmp_path / "market" / "searched-s0-s1.safetensors"
    plan = Plan("onnx", int8=True, inside=True, batch=4)
    assert plan.file_beside(weights) == tmp_path / "market" / "searched-s0-s1-int8-inside-b4.onnx"
    assert export.result_of(weights, plan, "market", None) == weights.with_name("searched-s0-onnx-int8-inside-b4-s1.json")
    compressed = tmp_path / "market" / "searched-compress" / "searched-slice8-s1.safetensors"
    beside = compressed.with_name("searched-slice8-onnx-s1.json")
    assert export.result_of(compressed, Plan("onnx"), "market", None) == beside
    assert export.result_of(weights, Plan("onnx"), "veri", None) == Path("results/veri/searched-s0-onnx-s1.json")
    assert export.result_of("net.safetensors", Plan("onnx", exit=2), "cuhk03/labeled", "r") == Path(
        "r/cuhk03-labeled/net-exit2-onnx.json")


# ---------------------------------------------------------------------------------------- opening
@pytest.mark.parametrize("format", ALL)
def test_files_that_are_no_exports(format, tmp_path):
    path = tmp_path / f"net{FORMATS[format].ending}"
    with pytest.raises(UserError, match=r"no exported network at .*: `autoreid export` writes one"):
        open_exported(path)
    path.write_bytes(b"not a network")
    with pytest.raises(UserError, match=rf"cannot be opened by {FORMATS[format].runtime} .*: damaged, or written by"):
        open_exported(path)


def test_of_another_program_or_size(tmp_path):
    with pytest.raises(UserError, match=r"net.tflite is no exported network: their names end in .onnx, .pt2, .xml"):
        open_exported(tmp_path / "net.tflite")
    foreign = torch.export.export(nn.Flatten(), (torch.zeros(1, 3, *SIZE),))
    torch.export.save(foreign, tmp_path / "foreign.pt2")
    with pytest.raises(UserError, match=r"foreign.pt2 was not written by `autoreid export`"):
        open_exported(tmp_path / "foreign.pt2")
    file, _ = exported(tiny(), Plan("torch-export"), tmp_path)
    with pytest.raises(UserError, match=r"takes pictures of B x 3 x 32 x 16, and these are 1 x 3 x 16 x 16; resize them"):
        file(torch.zeros(1, 3, 16, 16))


def test_telemetry_is_off_within_and_the_variable_as_before(monkeypatch):
    import os

    for before in (None, "no"):
        monkeypatch.delenv("CI", raising=False)
        if before is not None:
            monkeypatch.setenv("CI", before)
        with runtimes.no_telemetry():
            assert os.environ["CI"] == "true"
        assert os.environ.get("CI") == before


def test_latency_by_threads_is_no_one_axis():
    from test_compare import result

    one, four = ({"device": "cpu", "batch": 1, "median": 3.0, "iqr": 0.1, "threads": n} for n in (1, 4))
    rows = table([result("a", latency_ms=one), result("b", latency_ms=four)])
    assert {where.split(", ")[-1] for where in rows["latency_on"]} == {"1 thread", "4 threads"}
    assert "file_bytes" not in rows


def test_the_pictures_are_the_datasets(planted_market):
    """That what is compared on are real pictures, decoded as for the evaluation."""
    samples = data.load("market", str(planted_market), parts=("train",)).train
    images = load_images(samples[:2], SIZE)
    assert images.dtype == torch.uint8 and images.float().std() > 10

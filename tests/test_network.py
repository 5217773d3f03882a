"""The derived network against the published figures, as integers, and names to networks and back."""

import json

import pytest
import torch
from reference import LiteralPartAware
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoreid.errors import UserError
from autoreid.network import CellNet, ModelSpec, find_model, known_models, load_weights, parameters, save_weights
from autoreid.ops import OPS, PartAware
from autoreid.space import SearchSpace

# C = 64, layers 2,2,2,2, a 2048 -> 751 classifier, 384 x 128. The paper's table 1 and 4, in M and G:
# 11.9/2.03, 10.9/1.7, 11.4/1.8, 9.1/1.75, 13.5/2.3.
# "literal" counts the part-aware module's 1 x 1 convolution on the concatenated map, as the paper writes it; ours is
# the exact split form, which is cheaper.
PUBLISHED = {
    #                          parameters   MACs           MACs, literal
    "autoreid-baseline":       (11_841_199, 2_029_328_384, 2_029_328_384),
    "autoreid-baseline-reid":  (10_972_847, 1_679_630_928, 1_703_686_736),
    "autoreid-retrieval-reid": (11_409_519, 1_828_097_320, 1_840_125_224),
    "darts-v2":                (9_016_367, 1_689_344_000, 1_689_344_000),
    "gdas-v1":                 (13_457_839, 2_141_247_488, 2_141_247_488),
}  # fmt: skip


def counted(net: nn.Module, classifier: nn.Module) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(net(torch.empty(1, 3, 384, 128, device="meta")))
    return parameters(net) + parameters(classifier), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name, monkeypatch):
    params, macs, literal = PUBLISHED[name]
    with torch.device("meta"):
        net, classifier = find_model(name, {"neck": "none"}).build().eval(), nn.Linear(2048, 751)
        assert counted(net, classifier) == (params, macs)
        monkeypatch.setitem(OPS, "part_aware", lambda c, s, _, stripes: LiteralPartAware(PartAware(c, s, True, stripes)))
        net = find_model(name, {"neck": "none"}).build().eval()
        assert counted(net, classifier) == (params, literal)


def test_stage_maps_at_the_papers_size():
    with torch.device("meta"):
        maps = find_model("darts-v2").build().eval().backbone.stages(torch.empty(1, 3, 384, 128))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 96, 32), (512, 48, 16), (1024, 24, 8), (2048, 12, 4)]


@pytest.mark.parametrize(("stem", "extra"), [("pool", 0), ("conv", 64 * 64 * 9 + 128), ("half", 0)])
def test_stems(stem, extra):
    net = find_model("darts-v2", {"stem": stem}).build()
    assert parameters(net.backbone.stem) == 3 * 64 * 9 + 128 + extra
    assert net.backbone.stem(torch.empty(1, 3, 64, 32)).shape[2:] == ((32, 16) if stem == "half" else (16, 8))


@pytest.mark.parametrize("size", [(64, 32), (50, 30), (33, 17), (16, 16)])
def test_any_input_size(size):
    genotype = SearchSpace.load("reid").random(1)
    net = CellNet(genotype, channels=4, layers=(1, 1, 1, 1), stem="half")
    assert net(torch.randn(2, 3, *size)).shape[1] == net.channels == 4 * 8 * 4


def test_forward_returns_the_same_in_both_modes():
    net = find_model("random-reid", {"channels": 4, "layers": "1,1", "embedding_dim": "10"}).build()
    for mode in (True, False):
        assert net.train(mode)(torch.randn(2, 3, 32, 16)).shape == (2, 10)
    assert net.dims == 10


def test_drop_path_drops_whole_edges_and_never_identities():
    genotype = SearchSpace.load("reid").random(0)
    net = CellNet(genotype, channels=4, layers=(1, 1), drop_path=0.5)
    edges = [edge for cell in net.cells for edge in cell.edges]
    assert all((edge.drop == 0) == isinstance(edge.operation, nn.Identity) for edge in edges)
    edge = next(e for e in edges if e.drop and isinstance(e.operation, nn.Sequential))
    x = torch.randn(64, 4, 6, 6)
    y = edge.train()(x)
    kept = y.flatten(1).abs().sum(1) > 0
    assert 10 < kept.sum() < 54
    again = edge.operation(x)
    torch.testing.assert_close(y[kept], 2 * again[kept])


# ---------------------------------------------------------------------------------------- names
def test_labels_tell_options_apart():
    assert find_model("resnet18").label == "resnet18"
    assert find_model("resnet18", {"width": "20", "stem": "3"}).label == "resnet18-stem3-width20"
    assert find_model("random-reid", {"genotype_seed": "2"}).label == "random-reid-g2"


def write_searched(tmp_path):
    genotype = SearchSpace.load("reid").random(4)
    data = {**genotype.to_dict(), "provenance": {"macro": {"channels": 12, "layers": [1, 1], "stem": "half"}}}
    path = tmp_path / "drawn-reid-gdas-s0" / "genotype.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    return path


def test_a_searched_genotype_is_built_in_the_size_its_search_recorded(tmp_path):
    path = write_searched(tmp_path)
    spec = find_model(str(path))
    assert spec.label == "drawn-reid-gdas-s0"
    assert spec.build().backbone.channels == 12 * 2 * 4
    assert find_model(str(path), {"channels": "6"}).build().backbone.channels == 6 * 2 * 4
    assert find_model("random-reid", match=path).backbone == {"channels": 12, "layers": (1, 1), "stem": "half"}


def test_matching_width_is_the_nearest(tmp_path):
    path = write_searched(tmp_path)
    wanted = parameters(find_model(str(path)).build().backbone)
    width = find_model("resnet18", match=path).backbone["width"]
    distance = {w: abs(parameters(find_model("resnet18", {"width": w}).build().backbone) - wanted) for w in range(1, 12)}
    assert width == min(distance, key=distance.get)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("resnet81", {}, "unknown model 'resnet81'; did you mean 'resnet18'? known: "
     + ", ".join(sorted([*known_models(), "PATH/genotype.json"]))),
    ("resnet18", {"widht": "3"}, "unknown option of resnet18 'widht'; did you mean 'width'? known: dropout, "
     "embedding_dim, fc, head, int8, keep, last_stride, neck, pooling, rank, slice, stem, width"),
    ("resnet18", {"head": "exits", "fc": "linear"}, "unknown option of resnet18 'fc'; known: dropout, embedding_dim, "
     "head, hidden, int8, keep, last_stride, neck, pooling, rank, slice, stem, width"),
    ("ha-cnn", {"head": "exits"}, "head=exits: ha-cnn has the head streams alone; its image regions would be built for "
     "nothing"),
    ("resnet18", {"head": "exit"}, "unknown head 'exit'; did you mean 'exits'? known: exits, pooled, streams"),
    ("resnet18", {"width": "big"}, "width=big: width must be a whole number (default 64)"),
    ("darts-v2", {"layers": "2,a"}, "layers=2,a: layers must be whole numbers as in 2,2,2,2 (default (2, 2, 2, 2))"),
])
def test_mistakes_are_named(name, options, words):
    with pytest.raises(UserError) as fault:
        find_model(name, options)
    assert str(fault.value) == words


@pytest.mark.parametrize(("option", "words"), [
    ({"stem": "none"}, "unknown stem 'none'; known: conv, half, pool"),
    ({"pooling": "gme"}, "unknown pooling 'gme'; did you mean 'gem'? known: average, gem, gem-channel, max"),
    ({"channels": "1"}, "channels=1: allowed is 2 or more"),
    ({"layers": "2,0"}, "channels=64, layers=[2, 0]: channels must be at least 2 and every stage needs a cell, as in "
     "channels=64, layers=2,2,2,2"),
])
def test_bad_sizes_are_named(option, words):
    with pytest.raises(UserError) as fault:
        find_model("darts-v2", option).build()
    assert str(fault.value) == words


# ---------------------------------------------------------------------------------------- weights on disk
@pytest.mark.parametrize("name", ["random-reid", "resnet18"])
def test_weights_rebuild_the_network_alone(tmp_path, name):
    options = {"channels": 4, "layers": "1,1"} if name == "random-reid" else {"width": 4}
    spec = find_model(name, {**options, "pooling": "gem"})
    net = spec.build()
    net(torch.randn(4, 3, 32, 16))  # moves the running statistics
    save_weights(tmp_path / "w.safetensors", net, spec, input=[32, 16])
    again, metadata = load_weights(tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 32, 16)
    assert torch.equal(net.eval()(x), again(x)) and metadata["input"] == [32, 16]
    assert ModelSpec.from_dict(metadata["model"]).label == spec.label


def test_bad_weight_files(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        load_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_weights(tmp_path / "w.safetensors")

"""The ImageNet start, from weight files made here of freshly initialised torchvision networks; no network is touched."""

import hashlib
import re
from functools import partial
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from reference_torchvision import randomised, resized
from safetensors.torch import save_file
from torch import nn

from autoreid.backbones import BACKBONES, densenet, resnet, shufflenet_v2, vit
from autoreid.backbones.densenet import DenseNet
from autoreid.backbones.resnet import ResNet, resnet18
from autoreid.backbones.shufflenet_v2 import ShuffleNetV2
from autoreid.backbones.vit import ViT
from autoreid.errors import UserError
from autoreid.pretrained import imagenet_weights, load_imagenet

# a small network of each family: torchvision's and ours; the size of the pictures
SMALL = {
    "resnet": (lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7),
               lambda: ResNet(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1), 64, 2, 7), (64, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 1, 2, 1), 6), lambda: DenseNet((2, 1, 2, 1), 4, 6, True),
                 (64, 32)),
    "shufflenet_v2": (lambda: torchvision.models.ShuffleNetV2([2, 2, 2], [4, 8, 16, 16, 32]),
                      lambda: ShuffleNetV2((2, 2, 2), (4, 8, 16, 16, 32)), (64, 32)),
    "vit": (lambda: torchvision.models.VisionTransformer(64, 16, 4, 2, 8, 32), lambda: ViT(8, (4, 4), 8, 4, 2), (64, 64)),
}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """torch.hub's folder of weights, empty; a download fails the test unless the test replaces it."""
    def download(*_):
        raise AssertionError("a test wants to download")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def weights(tmp_path):
    """A state dict of the torchvision network that has BasicBlocks 1, 1, 1, 1, and how to save it."""
    state = SMALL["resnet"][0]().state_dict()
    return state, tmp_path / "weights.pth"


def small_resnet() -> ResNet:
    return SMALL["resnet"][1]()


def fault_of(backbone, name, file=None) -> str:
    with pytest.raises(UserError) as fault:
        load_imagenet(backbone, name, file)
    assert "\n" not in str(fault.value)
    return str(fault.value)


# ---------------------------------------------------------------------------------------- what fits
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("family", SMALL)
def test_a_loaded_network_gives_torchvisions_maps(family, kind, tmp_path):
    make, build, size = SMALL[family]
    theirs, ours, images = randomised(make()), build().eval(), torch.randn(2, 3, *size)
    save = torch.save if kind == "pth" else save_file
    save(theirs.state_dict(), tmp_path / f"weights.{kind}")
    load_imagenet(ours, family, str(tmp_path / f"weights.{kind}"))
    pooled = []
    last = next(module for module in reversed(list(theirs.modules())) if isinstance(module, nn.Linear))  # the classifier
    last.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        theirs(images)
        torch.testing.assert_close(ours(images).mean((2, 3)), pooled[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in (resnet, densenet, shufflenet_v2, vit) for name in family.IMAGENET])
def test_the_published_weights_of_every_model_fit(family, name):
    original = {"vit_b16": "vit_b_16"}.get(name, name)
    assert torchvision.models.get_weight(family.IMAGENET[name]) in torchvision.models.get_model_weights(original)
    with torch.device("meta"):
        ours, state = getattr(family, name)(), torchvision.models.get_model(original).state_dict()
    fresh = getattr(ours, "not_pretrained", ("-",))
    assert {k: v.shape for k, v in ours.from_torchvision(state).items()} == {
        k: v.shape for k, v in ours.state_dict().items() if not k.startswith(fresh)}


def test_files_older_than_torchvisions_modules_fit(tmp_path):
    densenet_state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d\.)", r"\1.\2", name): value
        for name, value in SMALL["densenet"][0]().state_dict().items() if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer2.norm.1.weight" in densenet_state
    vit_state = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in SMALL["vit"][0]().state_dict().items()
    }
    assert "encoder.layers.encoder_layer_3.mlp.linear_2.bias" in vit_state
    for family, state in (("densenet", densenet_state), ("vit", vit_state)):
        torch.save(state, tmp_path / "old.pth")
        ours = SMALL[family][1]()
        load_imagenet(ours, family, tmp_path / "old.pth")
        pairs = {
            "densenet": ("features.denseblock1.denselayer2.conv1.weight", "features.denseblock1.denselayer2.conv.1.weight"),
            "vit": ("encoder.layers.encoder_layer_3.mlp.3.weight", "encoder.layers.encoder_layer_3.mlp.linear_2.weight"),
        }
        new, old = pairs[family]
        assert torch.equal(ours.state_dict()[new], state[old])


def test_options_that_keep_the_weights_shapes_are_free(tmp_path, weights):
    state, path = weights
    torch.save(state, path)
    ours = ResNet(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1), 64, last_stride=1, stem=7)
    load_imagenet(ours, "resnet", path)
    assert torch.equal(ours.layers[3][0].conv1.weight, state["layer4.0.conv1.weight"])
    theirs = SMALL["vit"][0]()
    torch.save(theirs.state_dict(), path)
    cut = ViT(3, (2, 3), 8, 4, 2)
    load_imagenet(cut, "vit", path)
    expected = resized(theirs.encoder.pos_embedding.detach(), (4, 4), (2, 3))
    torch.testing.assert_close(cut.encoder.pos_embedding.detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_a_backbone_declares_as_its_own_stays_as_it_is(tmp_path):
    torch.save(randomised(SMALL["densenet"][0]()).state_dict(), tmp_path / "w.pth")
    ours = SMALL["densenet"][1]()
    nn.init.constant_(ours.taps["denseblock2"][0].weight, 3.0)
    load_imagenet(ours, "densenet", tmp_path / "w.pth")
    assert (ours.taps["denseblock2"][0].weight == 3).all()
    ours.not_pretrained = ()
    assert "do not fit: missing: taps.denseblock1.0.weight, " in fault_of(ours, "densenet", tmp_path / "w.pth")


# ---------------------------------------------------------------------------------------- where the file comes from
def test_the_file_in_hubs_folder_is_taken(hub):
    theirs, ours = torchvision.models.resnet18(), resnet18()
    hub.mkdir(parents=True)
    torch.save(theirs.state_dict(), hub / "resnet18-f37072fd.pth")
    load_imagenet(ours, "resnet18")
    assert torch.equal(ours.layers[3][1].conv2.weight, theirs.layer4[1].conv2.weight)


def test_the_file_is_downloaded_once(hub, monkeypatch):
    calls = []

    def download(url, to, checksum):
        calls.append((url, to, checksum))
        torch.save(torchvision.models.resnet18().state_dict(), to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        load_imagenet(resnet18(), "resnet18")
    assert calls == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", str(hub / "resnet18-f37072fd.pth"),
                      "f37072fd")]


def test_offline_the_message_says_what_to_fetch_and_where_to_put_it(hub, monkeypatch):
    def download(*_):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert fault_of(resnet18(width=2), "resnet18") == (
        f"resnet18: its ImageNet weights are not at {hub / 'resnet18-f37072fd.pth'}, and "
        "https://download.pytorch.org/models/resnet18-f37072fd.pth could not be downloaded (<urlopen error no route to "
        "host>); put the file there by hand, or give it as --init FILE")


def test_a_download_that_is_not_what_its_name_promises_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.undo()  # torch's own download, of a file
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    data = tmp_path / "data"
    torch.save(torchvision.models.resnet18().state_dict(), data)
    digits = hashlib.sha256(data.read_bytes()).hexdigest()[:8]
    for name, fits in ((f"right-{digits}.pth", True), ("wrong-00000000.pth", False)):
        data = data.rename(tmp_path / name)
        entry = SimpleNamespace(url=data.as_uri())
        monkeypatch.setattr(torchvision.models, "get_weight", lambda _, entry=entry: entry)
        if fits:
            load_imagenet(resnet18(), "resnet18")
        else:
            assert "could not be downloaded (invalid hash value (expected" in fault_of(resnet18(), "resnet18")
        assert (hub / name).exists() == fits


def test_names_of_models_lead_to_their_weights(monkeypatch):
    assert imagenet_weights("resnet50") == "ResNet50_Weights.IMAGENET1K_V1"
    assert imagenet_weights("nothing") is None
    monkeypatch.setitem(BACKBONES, "another-name", resnet.resnet34)
    monkeypatch.setitem(BACKBONES, "options-fixed", partial(densenet.densenet201, taps=False))
    monkeypatch.setitem(BACKBONES, "without", shufflenet_v2.ShuffleNetV2)
    assert imagenet_weights("another-name") == "ResNet34_Weights.IMAGENET1K_V1"
    assert imagenet_weights("options-fixed") == "DenseNet201_Weights.IMAGENET1K_V1"
    assert imagenet_weights("without") is None


def test_a_model_without_a_way_is_told_which_have_one(monkeypatch, weights):
    models = {"vit": vit.vit_b16, "mine": nn.Linear, "resnet18": resnet18}
    monkeypatch.setattr("autoreid.pretrained.BACKBONES", models)
    assert fault_of(nn.Linear(2, 2), "mine") == (
        "mine has no way to start from ImageNet weights; models that have: resnet18, vit; give one of these or leave out "
        "--init")
    assert fault_of(small_resnet(), "mine") == (
        "mine has no ImageNet weights of its own; models that have: resnet18, vit; give a file: --init FILE")
    state, path = weights
    torch.save(state, path)
    load_imagenet(small_resnet(), "mine", path)  # a file needs no known name


# ---------------------------------------------------------------------------------------- what does not fit
ADVICE = (" --init takes torchvision's weights of this very model in its published size: leave out options that change it "
          "(as width or stem), or --init")


def change(state, without=(), extra=None):
    return {**{name: value for name, value in state.items() if not name.startswith(without)}, **(extra or {})}


@pytest.mark.parametrize(("without", "extra", "words"), [
    (("layer2.0.bn1.", "conv1."), {}, "missing: stem.0.weight, layers.1.0.bn1.weight, layers.1.0.bn1.bias, and 2 more."),
    (("bn1.bias",), {}, "missing: stem.1.bias."),
    ((), {"aux.weight": torch.ones(2)}, "unexpected: aux.weight."),
    ((), {"fc2.weight": torch.ones(2)}, "unexpected: fc2.weight."),  # the classifier is fc, and nothing else
    ((), {"bn1.bias": torch.ones(3)}, "of another shape: stem.1.bias (file 3, network 64)."),
    ((), {"bn1.bias": torch.tensor(3.0)}, "of another shape: stem.1.bias (file scalar, network 64)."),
    (("bn1.weight",), {"a": torch.ones(2), "bn1.bias": torch.ones(3)},
     "missing: stem.1.weight; unexpected: a; of another shape: stem.1.bias (file 3, network 64)."),
])
def test_every_tensor_finds_its_place_or_is_named(weights, without, extra, words):
    state, path = weights
    torch.save(change(state, tuple(without) or ("-",), extra), path)
    backbone = small_resnet()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert fault_of(backbone, "resnet10", path) == f"resnet10: the weights in {path} do not fit: {words}{ADVICE}"
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())  # nothing was loaded


def test_another_width_or_stem_does_not_fit(weights):
    state, path = weights
    torch.save(state, path)
    narrow = ResNet(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1), 20, 2, 7)
    words = fault_of(narrow, "resnet18-width20", path)
    assert "of another shape: stem.0.weight (file 64x3x7x7, network 20x3x7x7), stem.1.weight (file 64, network 20)" in words
    assert "leave out options that change it (as width or stem)" in words
    short = ResNet(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1), 64, 2, 3)
    assert "of another shape: stem.0.weight (file 64x3x7x7, network 64x3x3x3). " in fault_of(short, "resnet18", path)


def test_another_depth_does_not_fit(weights):
    state, path = weights
    torch.save(state, path)
    words = fault_of(ResNet(torchvision.models.resnet.BasicBlock, (1, 2, 1, 1), 64, 2, 7), "resnet12", path)
    assert "do not fit: missing: layers.1.1.conv1.weight, layers.1.1.bn1.weight, layers.1.1.bn1.bias, and 7 more." in words


# ---------------------------------------------------------------------------------------- what cannot be read
REMEDY = "give the state dict alone, as a .pth or .safetensors file"


def test_no_file(tmp_path):
    assert fault_of(small_resnet(), "resnet18", tmp_path / "no.pth") == (
        f"--init {tmp_path / 'no.pth'}: no such file; give scratch, imagenet, or a .pth or .safetensors file")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are no weights", b"PK\x03\x04 nor these"])
def test_a_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    words = re.sub(r"\(\w+\)", "(Kind)", fault_of(small_resnet(), "resnet18", tmp_path / name))
    assert words == (
        f"{tmp_path / name} cannot be read as weights (Kind): it is damaged or holds more than tensors; {REMEDY}")


def test_a_cut_download_in_hubs_folder_is_to_be_deleted(hub):
    hub.mkdir(parents=True)
    torch.save({"conv1.weight": torch.ones(1000)}, hub / "resnet18-f37072fd.pth")
    data = (hub / "resnet18-f37072fd.pth").read_bytes()
    (hub / "resnet18-f37072fd.pth").write_bytes(data[:-200])
    assert fault_of(small_resnet(), "resnet18").endswith("; delete it to have it downloaded again")


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"conv1.weight": Payload()}, tmp_path / "w.pth")
    words = fault_of(small_resnet(), "resnet18", tmp_path / "w.pth")
    assert "(UnpicklingError): it is damaged or holds more than tensors" in words
    assert not Payload.ran


@pytest.mark.parametrize(("content", "words"), [
    ([torch.ones(2)], "holds a list, not tensors by name"),
    (torch.ones(2), "holds a Tensor, not tensors by name"),
    ({"epoch": 3, "state_dict": {"conv1.weight": torch.ones(2)}}, "holds more than tensors by name: epoch, state_dict"),
    ({"w": torch.ones(1), 5: torch.ones(2)}, "holds more than tensors by name: 5"),
])
def test_a_file_of_something_else(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    assert fault_of(small_resnet(), "resnet18", tmp_path / "w.pth") == f"{tmp_path / 'w.pth'} {words}; {REMEDY}"

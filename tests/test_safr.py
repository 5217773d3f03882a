"""SAFR against its counts, as integers, against the slow networks of the reference, and against a plain ResNet."""

import itertools

import pytest
import torch
import torchvision
from reference_safr import dbam, global_attention, safr
from reference_safr import safr_micro as slow_micro
from reference_shufflenet_v2_plus import Tensors
from torch import nn

from autoreid.backbones.resnet import resnet18, resnet34, resnet50
from autoreid.backbones.safr import (
    ABLATIONS,
    DBAM,
    IMAGENET,
    BinaryMask,
    GlobalAttention,
    safr_baseline,
    safr_large,
    safr_medium,
    safr_micro,
    safr_small,
)
from autoreid.backbones.shufflenet_v2_plus import shufflenet_v2_plus_small
from autoreid.cost import measure
from autoreid.errors import UserError
from autoreid.heads import ReIDNet

MODELS = {  # and the ResNet they are made of: its function, convolutions of a block, blocks
    "large": (safr_large, resnet50, 3, (3, 4, 6, 3)),
    "medium": (safr_medium, resnet34, 2, (3, 4, 6, 3)),
    "small": (safr_small, resnet18, 2, (2, 2, 2, 2)),
}
OUT, FIRST, ALL, DENSE, DEPTHWISE = (
    {"dbam_site": "out"}, {"dbam_where": "first"}, {"dbam_where": "all"}, {"attention_conv": "dense"},
    {"attention_conv": "depthwise"},
)
CONVS = ["dense", "depthwise"]
NO_ATTENTION = {"global_attention": False, "local_attention": False}


# ---------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(("build", "options", "params", "macs_224", "macs_350"), [
    # the paper: 26 M, 4 G; 30 M, 4.5 G; 21 M, 3.8 G; 12 M, 1.8 G; 1.5 M, 0.13 G
    (safr_baseline, {}, 23_512_128, 4_087_136_256, 10_089_422_016),
    (safr_baseline, {"last_stride": 1}, 23_512_128, 6_206_570_496, 15_323_126_976),
    (safr_large, {}, 29_853_696, 5_936_824_320, 14_631_140_544),
    (safr_large, {**OUT, **FIRST, "mask": "soft"}, 24_773_696, 8_711_372_800, 21_482_552_512),  # the authors' code
    (safr_large, ALL, 46_224_128, 8_711_356_416, 21_482_536_128),
    (safr_large, OUT, 123_859_776, 19_809_484_800, 48_888_118_464),
    (safr_large, {**OUT, **ALL}, 385_752_896, 64_201_998_336, 158_510_447_808),
    (safr_large, {**OUT, **ALL, **DEPTHWISE}, 23_800_256, 4_200_935_424, 10_370_031_936),
    (safr_medium, DENSE, 21_433_216, 4_819_304_448, 11_871_550_656),
    (safr_medium, {}, 21_288_064, 3_681_312_768, 9_086_882_112),
    (safr_small, DENSE, 11_325_056, 2_969_616_384, 7_303_953_600),
    (safr_small, {}, 11_179_904, 1_831_624_704, 4_519_285_056),
    (safr_micro, DENSE, 1_431_082, 287_639_056, None),  # the paper has it at 224 only
    (safr_micro, {}, 1_404_082, 162_324_496, None),
    (safr_micro, NO_ATTENTION, 1_403_110, 156_679_696, None),
    (safr_micro, {**NO_ATTENTION, "projection": "after"}, 1_403_110, 131_120_656, None),
    (safr_micro, {**NO_ATTENTION, "xception": False}, 1_403_110 - 1_674, 156_679_696 - 1_458 * 56**2, None),
])
def test_counts(build, options, params, macs_224, macs_350):
    def net() -> nn.Module:
        return ReIDNet(build(**options), neck="layer")

    cost = measure(net, (224, 224))
    assert (cost.params, cost.macs) == (params, macs_224)
    assert macs_350 is None or measure(net, (350, 350)).macs == macs_350


@pytest.mark.parametrize(("name", "params"), [
    ("safr-fig5-baseline", 23_508_032),
    ("safr-fig5-batch-norm", 23_508_032 + 2048),  # the shift of a BNNeck does not learn
    ("safr-fig5-layer-norm", 23_508_032 + 2 * 2048),
    ("safr-fig5-global", 23_508_032 + 73_728),
    ("safr-fig5-local", 23_508_032 + 6_266_880 + 960),
    ("safr-fig5-all", 29_853_696),
])
def test_the_bars_of_figure_5(name, params):
    build, head = ABLATIONS[name]
    assert measure(lambda: ReIDNet(build(), **head), (64, 64)).params == params
    assert len(ABLATIONS) == 6


@pytest.mark.parametrize(("where", "blocks"), [
    ("first", ["0.0"]),
    ("first_of_stage", ["0.0", "1.0", "2.0", "3.0"]),
    ("all", ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]),
])
@pytest.mark.parametrize("site", ["mid", "out"])
def test_where_the_attention_is(where, blocks, site):
    net = safr_small(width=4, dbam_where=where, dbam_site=site)
    found = [name for name, module in net.named_modules() if isinstance(module, DBAM)]
    assert found == [f"layers.{block}.{site}" for block in blocks]
    assert net.not_pretrained == ("stem.global_attention.", *(f"{name}." for name in found))
    assert [type(module) for module in net.stem] == [
        nn.Conv2d, GlobalAttention, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d
    ]


# ---------------------------------------------------------------------------------------- against the slow networks
def settled(net, *shape):
    """In eval mode and float64, with norms that scale and shift, averages taken from one random batch, attention that
    is far from a half everywhere, and binary masks of both kinds of channels."""
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.momentum = 1
        elif isinstance(module, BinaryMask):
            nn.init.normal_(module.logits)
        elif isinstance(module, GlobalAttention):
            for conv in (module.conv1, module.conv2):
                nn.init.normal_(conv.weight, std=2 / (conv.in_channels // conv.groups * 9) ** 0.5)
    net.train()(torch.randn(*shape, dtype=torch.float64))
    return net.eval()


def assert_maps(maps, expected):
    assert len(maps) == len(expected) == 4
    for found, slow in zip(maps, expected):
        assert slow.std() > 0.05
        torch.testing.assert_close(found, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("conv", CONVS)
def test_global_attention(conv):
    net = settled(GlobalAttention(6, conv), 2, 6, 5, 4)
    x, tensors = torch.randn(2, 6, 7, 5, dtype=torch.float64), Tensors(net.state_dict())
    torch.testing.assert_close(net(x), global_attention(tensors, x))
    assert not tensors.rest


@pytest.mark.parametrize(("conv", "mask", "channels"), [*itertools.product(CONVS, ["ste", "soft"], [10, 32])])
def test_dbam(conv, mask, channels):
    net = settled(DBAM(channels, conv, mask), 2, channels, 5, 4)
    x, tensors = torch.randn(2, channels, 7, 5, dtype=torch.float64), Tensors(net.state_dict())  # negative values too
    torch.testing.assert_close(net(x), dbam(tensors, x, mask))
    assert not tensors.rest


@pytest.mark.parametrize(("site", "mask", "conv"), [*itertools.product(["mid", "out"], ["ste", "soft"], CONVS)])
@pytest.mark.parametrize(("model", "where"), [("small", "first"), ("small", "all"), ("large", "first_of_stage")])
def test_resnet_bodies_equal_the_slow_network(model, where, site, mask, conv):
    build, _, convolutions, blocks = MODELS[model]
    options = {"attention_conv": conv, "dbam_site": site, "dbam_where": where, "mask": mask}
    net = settled(build(width=4, **options), 4, 3, 64, 64)
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    maps = list(net.stages(images))
    assert_maps(maps, safr(net.state_dict(), images, convolutions, blocks, True, where, site, mask))
    assert torch.equal(net(images), maps[-1])


@pytest.mark.parametrize(("model", "with_global", "with_local"), [
    ("large", True, False), ("large", False, True), ("medium", True, True), ("small", False, False)
])
def test_each_attention_can_be_left_out(model, with_global, with_local):
    build, _, convolutions, blocks = MODELS[model]
    net = settled(build(4, 1, global_attention=with_global, local_attention=with_local, dbam_where="all"), 4, 3, 64, 64)
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    where = "all" if with_local else "none"
    expected = safr(net.state_dict(), images, convolutions, blocks, with_global, where, last_stride=1)
    assert_maps(list(net.stages(images)), expected)


@pytest.mark.parametrize("options", [
    {}, {"mask": "soft"}, {"attention_conv": "dense"}, {"xception": False}, {"projection": "after"},
    {"global_attention": False}, {"local_attention": False},
], ids=str)
def test_micro_equals_the_slow_network(options):
    net = settled(safr_micro(**options), 4, 3, 64, 64)
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    names = {"global_attention": "with_global", "local_attention": "with_local"}
    slow = {names.get(name, name): value for name, value in options.items() if name != "attention_conv"}
    assert_maps(list(net.stages(images)), slow_micro(net.state_dict(), images, **slow))


# ---------------------------------------------------------------------------------------- the binary mask
def test_the_binary_mask_begins_local_and_passes_its_gradient_straight_through():
    mask = BinaryMask(4)
    assert mask(torch.empty(0)).flatten().tolist() == [1, 1, 1, 1]
    logits = torch.tensor([-2.0, -0.1, 0.1, 30.0])
    mask.logits.data.copy_(logits[:, None, None])
    hard = mask(torch.empty(0))
    assert hard.flatten().tolist() == [0, 0, 1, 1]
    (hard.flatten() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    p = logits.sigmoid()
    torch.testing.assert_close(mask.logits.grad.flatten(), p * (1 - p) * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_channel_of_mask_0_is_global_and_can_come_back():
    net = DBAM(2, "dense", "ste")
    net.mask.logits.data[0] = -1.0
    x = torch.rand(1, 2, 4, 4)
    y = net(x)
    assert torch.equal(y[:, 0], x[:, 0]) and (y[:, 1] < x[:, 1]).all()
    y.sum().backward()
    assert net.mask.logits.grad.abs().min() > 0


# ---------------------------------------------------------------------------------------- beside a plain ResNet
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("last_stride", [1, 2])
def test_without_attention_it_is_a_resnet(model, last_stride):
    build, plain, _, _ = MODELS[model]
    net, resnet = build(4, last_stride, **NO_ATTENTION).eval(), plain(4, last_stride).eval()
    net.load_state_dict(resnet.state_dict())
    images = torch.randn(2, 3, 40, 33)
    for found, expected in zip(net.stages(images), resnet.stages(images), strict=True):
        assert torch.equal(found, expected)
    assert (net.channels, net.stage_channels, net.not_pretrained) == (resnet.channels, resnet.stage_channels, ())


def test_without_attention_micro_is_a_shufflenet_v2_plus():
    net, plain = safr_micro(**NO_ATTENTION, xception=False).eval(), shufflenet_v2_plus_small().eval()
    net.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 40, 33)
    assert torch.equal(net(images), plain(images))
    extra = set(safr_micro().state_dict()) - set(plain.state_dict())
    parts = ("stem.global_attention.", "layers.0.dbam.", "layers.0.xception.")
    assert all(name.startswith(parts) for name in extra)
    assert all(any(name.startswith(part) for name in extra) for part in parts)


@pytest.mark.parametrize(("name", "build"), [
    ("safr_baseline", safr_baseline), ("safr_large", safr_large), ("safr_medium", safr_medium), ("safr_small", safr_small)
])
def test_imagenet_weights_fit_all_but_the_attention(name, build):
    architecture = IMAGENET[name].split("_")[0].lower()
    with torch.device("meta"):
        state = torchvision.models.get_model(architecture).state_dict()
        net = build()
        missing, unexpected = net.load_state_dict(net.from_torchvision(state), strict=False, assign=True)
    assert not unexpected
    ours = [key for key in net.state_dict() if key.startswith(net.not_pretrained)] if net.not_pretrained else []
    assert missing == ours and all(any(key.startswith(prefix) for key in ours) for prefix in net.not_pretrained)


# ---------------------------------------------------------------------------------------- the interface
@pytest.mark.parametrize("build", [
    lambda **options: safr_large(width=16, **options), lambda **options: safr_small(width=32, **options), safr_micro
], ids=["large", "small", "micro"])
@pytest.mark.parametrize("options", [{}, {"mask": "soft"}, {"attention_conv": "dense"}], ids=str)
def test_every_parameter_gets_a_gradient(build, options):
    net = build(**options)
    y = net(torch.randn(4, 3, 64, 64))
    (y * torch.randn_like(y)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("size", [(64, 32), (50, 31), (1, 1)])
@pytest.mark.parametrize(("build", "channels"), [
    (lambda: safr_baseline(4), 128), (lambda: safr_large(4), 128), (lambda: safr_medium(4), 32),
    (lambda: safr_small(4), 32), (safr_micro, 1280),
], ids=["baseline", "large", "medium", "small", "micro"])
def test_any_input_size_in_both_modes(build, channels, size):
    net = build()
    assert net.channels == net.stage_channels[-1] == channels
    for mode in (True, False):
        assert net.train(mode)(torch.randn(2, 3, *size)).shape == (2, channels, -(-size[0] // 32), -(-size[1] // 32))


def test_who_stops_reading_stops_the_computation():
    net, ran = safr_small(4), []
    for number, layer in enumerate(net.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert next(net.stages(torch.randn(2, 3, 32, 32))).shape[1] == 4 and ran == [0]


@pytest.mark.parametrize(("build", "options", "words"), [
    (safr_large, {"attention_conv": "deptwise"},
     "unknown attention_conv 'deptwise'; did you mean 'depthwise'? known: dense, depthwise"),
    (safr_small, {"dbam_site": "in"}, "unknown dbam_site 'in'; known: mid, out"),
    (safr_medium, {"dbam_where": "frist"},
     "unknown dbam_where 'frist'; did you mean 'first'? known: all, first, first_of_stage"),
    (safr_large, {"mask": "hard"}, "unknown mask 'hard'; known: soft, ste"),
    (safr_micro, {"attention_conv": "none"}, "unknown attention_conv 'none'; known: dense, depthwise"),
    (safr_micro, {"mask": "sote"}, "unknown mask 'sote'; did you mean 'ste'? known: soft, ste"),
    (safr_micro, {"projection": "befor"}, "unknown projection 'befor'; did you mean 'before'? known: after, before"),
])
def test_mistakes_are_named(build, options, words):
    with pytest.raises(UserError) as fault:
        build(**options)
    assert str(fault.value) == words


def test_a_bad_stride_is_named():
    with pytest.raises(UserError, match="last_stride=3, .*allowed: .*last_stride 1 or 2"):
        safr_large(last_stride=3)

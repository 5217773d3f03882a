"""Every figure against a formula written out by hand, or an exact integer frozen for a known network."""

import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from autoreid import cost
from autoreid.cost import Cost, latency, measure


def test_convolution():
    found = measure(lambda: nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2)), size=(10, 7))
    places = 5 * 4  # ceil(10 / 2) x ceil(7 / 2)
    macs = places * 8 * (3 * 3 * 5)
    assert found == Cost(
        params=8 * 3 * 15 + 8, macs=macs, macs_all=macs + places * 8, activation_bytes=4 * (3 * 70 + 8 * places)
    )


def test_convolution_without_bias_has_nothing_to_add():
    found = measure(lambda: nn.Conv2d(3, 8, 1, bias=False), size=(4, 4))
    assert found.macs == found.macs_all == 16 * 3 * 8


def test_depthwise_convolution():
    found = measure(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), size=(5, 7), channels=6)
    assert (found.params, found.macs, found.macs_all) == (6 * 9, 35 * 6 * 9, 35 * 6 * 9)


def test_linear():
    found = measure(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 2, 7)), size=(4, 2))
    assert found == Cost(params=24 * 7 + 7, macs=24 * 7, macs_all=24 * 7 + 7, activation_bytes=4 * (24 + 7))


@pytest.mark.parametrize("contiguous", [True, False])
def test_linear_on_tokens_counts_its_bias_in_both_ways_torch_computes_it(contiguous):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, images):  # B x C x H x W -> B x H x W x 5
            tokens = images.permute(0, 2, 3, 1)
            return self.linear(tokens.contiguous() if contiguous else tokens)

    found = measure(Tokens, size=(4, 6))
    assert (found.macs, found.macs_all) == (24 * 3 * 5, 24 * 3 * 5 + 24 * 5)


def test_an_addition_that_is_no_bias_costs_nothing():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 3, 1, bias=False), nn.Parameter(torch.zeros(6))

        def forward(self, images):
            return images + self.conv(images) + self.shift

    found = measure(Residual, size=(4, 6))
    assert found.macs == found.macs_all == 24 * 3 * 3


def test_batch_norm_is_two_per_element_and_no_mac():
    found = measure(lambda: nn.BatchNorm2d(3), size=(4, 5))
    assert found == Cost(params=6, macs=0, macs_all=2 * 60, activation_bytes=4 * (60 + 60))


@pytest.mark.parametrize("inplace, maps", [(False, 2), (True, 1)])
@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_relu_is_one_per_element_and_in_place_takes_no_memory(relu, inplace, maps):
    assert measure(lambda: relu(inplace=inplace), size=(4, 5)) == Cost(0, 0, 60, 4 * 60 * maps)


def test_other_activations_cost_nothing_in_this_convention():
    assert measure(lambda: nn.Sequential(nn.Hardtanh(), nn.GELU(), nn.AvgPool2d(2)), size=(4, 4)).macs_all == 0


class Attention(nn.Module):
    """Scaled dot product attention of the pixels: 2 heads of 3 channels each."""

    def forward(self, images):  # B x 6 x H x W
        heads = images.flatten(2).unflatten(1, (2, 3)).transpose(2, 3)  # B x 2 x HW x 3
        return F.scaled_dot_product_attention(heads, heads, heads)


def test_scaled_dot_product_attention():
    tokens = 4 * 5
    found = measure(Attention, size=(4, 5), channels=6)
    assert found.macs == 2 * (tokens * tokens * 3) + 2 * (tokens * tokens * 3)  # QK' and AV, two heads of three
    assert found.params == 0


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, num_heads=2, batch_first=True)

    def forward(self, images):  # B x 6 x H x W
        tokens = images.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_multi_head_attention():
    tokens = 4 * 5
    found = measure(SelfAttention, size=(4, 5), channels=6)
    projections = tokens * 6 * 18 + tokens * 6 * 6  # q, k and v; output
    assert found.macs == projections + 2 * tokens * tokens * 6
    assert found.macs_all == found.macs + tokens * 18 + tokens * 6
    assert found.params == 6 * 18 + 18 + 6 * 6 + 6


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_is_off_only_while_counting(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        measure(SelfAttention, size=(2, 2), channels=6)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(RuntimeError):
            measure(lambda: nn.Linear(5, 5), size=(2, 2))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_activation_peak_frees_what_nobody_holds():
    def build():  # maps of 4, 16, 2 and 1 channels on 10 places
        widths = (4, 16, 2, 1)
        return nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))

    # The input is the caller's to the end. The second convolution has its input and output: 4 + 16 + 2.
    assert measure(build, size=(2, 5), channels=4).activation_bytes == 4 * 10 * (4 + 16 + 2)


def test_activation_peak_keeps_a_shortcut_alive():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(1, 5, 1), nn.Conv2d(5, 7, 1), nn.Conv2d(7, 5, 1)

        def forward(self, images):
            shortcut = self.one(images)
            return shortcut + self.three(self.two(shortcut))

    # At the third convolution: input 1, shortcut 5, its input 7 and its output 5.
    assert measure(Block, size=(2, 5), channels=1).activation_bytes == 4 * 10 * (1 + 5 + 7 + 5)


def test_activation_peak_counts_views_once_and_indices_as_they_are():
    assert measure(nn.Flatten, size=(4, 4)).activation_bytes == 4 * 48
    # Max pooling returns 3 x 2 x 2 values of 4 bytes and as many int64 indices.
    assert measure(lambda: nn.MaxPool2d(2), size=(4, 4)).activation_bytes == 4 * 48 + 12 * (4 + 8)


def test_frozen_and_shared_parameters():
    def build():
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        net[1] = net[0]
        net[0].bias.requires_grad_(False)
        return net

    found = measure(build, size=(2, 2))
    assert (found.params, found.macs) == (9, 2 * 4 * 9)


def test_nothing_is_allocated_for_a_net_of_four_terabytes():
    assert measure(lambda: nn.Conv2d(3, 1_000_000, 577, bias=False), size=(577, 577)).params == 3 * 10**6 * 577**2


def test_dropout_and_training_branches_are_those_of_eval_mode():
    class OnlyInTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images):
            return self.conv(images) if self.training else images

    assert measure(OnlyInTraining, size=(4, 4)).macs == 0


# The figures of Auto-ReID's comparison (384 x 128, 751 identities, no embedding layer), exact.
RESNETS = {
    "resnet18": (11_561_775, 1_776_934_400, 1_784_062_191),
    "resnet34": (21_669_935, 3_588_873_728, 3_599_687_919),
    "resnet50": (25_046_831, 4_005_263_360, 4_036_451_055),
}


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_at_384_x_128(name):
    found = measure(lambda: getattr(torchvision.models, name)(num_classes=751), size=(384, 128))
    assert (found.params, found.macs, found.macs_all) == RESNETS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_macs_all_of_a_resnet_from_its_layers(name):
    """The same sum over the modules of a real network, from output shapes that forward hooks see."""
    net = getattr(torchvision.models, name)(num_classes=10).eval()
    extra = 0

    def hook(module, _, out):
        nonlocal extra
        extra += {nn.BatchNorm2d: 2, nn.ReLU: 1, nn.Linear: 1}[type(module)] * out.numel()

    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.ReLU, nn.Linear)):
            module.register_forward_hook(hook)
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 32))
    found = measure(lambda: getattr(torchvision.models, name)(num_classes=10), size=(64, 32))
    assert found.macs_all - found.macs == extra


def test_vision_transformer_attention_is_not_lost():
    found = measure(torchvision.models.vit_b_16, size=(224, 224))
    tokens, width = 197, 768
    block = tokens * width * (3 * width + width + 4 * width + 4 * width) + 2 * tokens * tokens * width
    patches = 196 * width * 3 * 16 * 16
    assert found.macs == patches + 12 * block + width * 1000 == 17_563_828_224


def test_activation_peak_of_resnet18_is_where_the_stem_widens():
    found = measure(lambda: torchvision.models.resnet18(num_classes=751), size=(384, 128))
    image, map1 = 3 * 384 * 128, 64 * 192 * 64
    assert found.activation_bytes == 4 * (image + 2 * map1)  # batch norm of the stem is not in place


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_activation_peak_on_meta_is_that_of_a_real_run(name):
    net = getattr(torchvision.models, name)(num_classes=10).eval()
    images = torch.zeros(1, 3, 64, 32)
    peak = cost._Activations(images, [*net.parameters(), *net.buffers()])
    with torch.no_grad(), peak:
        net(images)
    found = measure(lambda: getattr(torchvision.models, name)(num_classes=10), size=(64, 32))
    assert found.activation_bytes == peak.peak


def test_latency_gives_what_the_contract_says_and_leaves_the_mode():
    net = nn.Conv2d(3, 4, 3).train()
    found = latency(net, size=(8, 8), repeats=5, warmup=1, batch=2)
    assert list(found) == ["device", "batch", "median", "iqr"]
    assert (found["device"], found["batch"]) == ("cpu", 2)
    assert 0 < found["median"] < 1000 and 0 <= found["iqr"] < 1000
    assert net.training


def test_latency_is_the_median_and_quartiles_in_milliseconds_without_the_warmup(monkeypatch):
    clock = iter([0, 9, *(t for k, seconds in enumerate([0.001, 0.002, 0.003, 0.004, 0.1]) for t in (k, k + seconds))])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    modes = []
    net = nn.Identity()
    net.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_inference_mode_enabled())))
    found = latency(net, size=(2, 2), repeats=5, warmup=1)
    assert found["median"] == pytest.approx(3) and found["iqr"] == pytest.approx(2)
    assert modes == [(False, True)] * 6


def test_the_examples():
    failed, tried = doctest.testmod(cost)
    assert tried and not failed

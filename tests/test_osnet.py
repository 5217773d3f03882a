"""OSNet against the published counts, as integers, and against its slow twin."""

import pytest
import torch
from reference_osnet import osnet as slow_osnet
from torch import nn

from autoreid.backbones.osnet import (
    OmniScaleBlock,
    osnet,
    osnet_x0_5,
    osnet_x0_25,
    osnet_x0_75,
    osnet_x1_0,
)
from autoreid.cost import measure
from autoreid.errors import UserError
from autoreid.heads import ReIDNet

SIZE = (256, 128)
VARIANTS = {"x1_0": osnet_x1_0, "x0_75": osnet_x0_75, "x0_5": osnet_x0_5, "x0_25": osnet_x0_25}
COUNTS = {  # of the backbone, and with Table 1's fully connected layer of 512, which the head holds
    #        parameters  MACs         parameters, MACs with the layer
    "x1_0":  (1_905_828, 978_613_248, 2_169_508, 978_875_392),
    "x0_75": (1_087_610, 571_555_584, 1_285_754, 571_752_192),
    "x0_5":  (497_426, 272_768_256, 630_034, 272_899_328),
    "x0_25": (134_792, 82_249_344, 201_864, 82_314_880),
}  # fmt: skip
# what the authors' compute_model_complexity prints for the network without its classifier
PRINTED = {"x1_0": (2_193_616, 978_878_352), "x0_25": (203_568, 82_316_000)}


def with_layer(name):
    return ReIDNet(VARIANTS[name](), embedding_dim=512, fc="norm-relu", neck="none")


@pytest.mark.parametrize("name", VARIANTS)
def test_counts(name):
    alone, whole = measure(VARIANTS[name], SIZE), measure(lambda: with_layer(name), SIZE)
    assert (alone.params, alone.macs, whole.params, whole.macs) == COUNTS[name]


@pytest.mark.parametrize("name", PRINTED)
def test_the_authors_counter_comes_to_what_it_prints(name):
    """It adds a module's parameters up at each call, so a gate's four times, and a bias addition for each output."""
    with torch.device("meta"):
        blocks = [module for module in VARIANTS[name]().modules() if isinstance(module, OmniScaleBlock)]
    gates = sum(p.numel() for block in blocks for p in block.gate.parameters())
    biases = 512 + 4 * sum(conv.bias.numel() for block in blocks for conv in block.gate if isinstance(conv, nn.Conv2d))
    _, _, params, macs = COUNTS[name]
    assert (params + 3 * gates, macs + biases) == PRINTED[name]


def test_instance_norm_adds_two_per_channel_of_conv2():
    """OSNet-IBN: conv1's norm is exchanged, conv2's two blocks get one more each; no product is added."""
    plain, ibn = measure(osnet_x1_0, SIZE), measure(lambda: osnet_x1_0(instance_norm=True), SIZE)
    assert (ibn.params - plain.params, ibn.macs) == (2 * 2 * 256, plain.macs)


@pytest.mark.parametrize("name", VARIANTS)
def test_stage_maps(name):
    with torch.device("meta"):
        net = VARIANTS[name]().eval()
        maps = list(net.stages(torch.empty(2, 3, *SIZE)))
    places = [(64, 32), (32, 16), (16, 8), (16, 8)]
    assert [tuple(m.shape) for m in maps] == [(2, c, *p) for c, p in zip(net.stage_channels, places, strict=True)]
    width = float(name[1:].replace("_", "."))
    assert net.stage_channels == tuple(int(width * c) for c in (256, 384, 512, 512))
    assert net.channels == net.stage_channels[-1]


def randomised(net):
    """Every tensor another value, the batch norms' statistics too, so that no exchange of two goes unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=generator) / 4)
            elif value.dim() == 4:
                value.normal_(0, 1.4 / value[0].numel() ** 0.5, generator=generator)
    return net.eval()


@pytest.mark.parametrize("ibn", [False, True])
@pytest.mark.parametrize("size", [(32, 16), (27, 45)])
def test_equals_its_slow_twin(size, ibn):
    net = randomised(osnet(0.25, instance_norm=ibn)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = list(net.stages(images))
        last = net(images)
    expected, unused = slow_osnet(net.state_dict(), images, ibn)
    assert unused == [] and len(maps) == len(expected)
    for ours, slow in zip(maps, expected, strict=True):
        assert slow.std() > 0.05  # a map that died would agree with anything
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-9)
    assert torch.equal(last, maps[-1])


def test_the_gate_is_shared_by_the_streams_and_weighs_channels():
    block = OmniScaleBlock(64, 64).eval()
    assert [len(stream) for stream in block.streams] == [1, 2, 3, 4]
    calls = []
    block.gate.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    x = torch.randn(2, 64, 8, 4)
    with torch.no_grad():
        block(x)
        reduced = block.reduce(x)
        for stream, (scale, weight) in zip(block.streams, calls, strict=True):
            torch.testing.assert_close(scale, stream(reduced))
            assert weight.shape == (2, 16, 1, 1) and ((weight > 0) & (weight < 1)).all()


def test_a_caller_that_stops_reading_stops_the_computation():
    net, called = osnet_x0_25().eval(), []
    for i, layer in enumerate(net.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: called.append(i))
    net.transitions[1].register_forward_hook(lambda module, args, out: called.append("transition"))
    maps = net.stages(torch.randn(1, 3, 32, 16))
    next(maps)
    assert called == [0]
    next(maps)
    assert called == [0, "transition", 1]


@pytest.mark.parametrize("ibn", [False, True])
def test_every_parameter_gets_a_gradient(ibn):
    torch.manual_seed(0)
    net = osnet_x1_0(instance_norm=ibn)  # at x0_25 a gate's hidden layer has one unit, which may start dead
    images = torch.randn(4, 3, 48, 32)
    out = net.train()(images)
    assert out.shape == net.eval()(images).shape == (4, 512, 3, 2)
    out.square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("size", [(13, 13), (13, 64), (33, 17), (50, 31)])
def test_small_and_odd_inputs(size):
    assert osnet_x0_25().eval()(torch.randn(1, 3, *size)).shape[1] == 128


@pytest.mark.parametrize(("call", "words"), [
    (lambda: osnet(width=0.3), "osnet: width=0.3; allowed: 1.0, 0.75, 0.5, 0.25"),
    (lambda: osnet_x0_25()(torch.empty(1, 3, 64, 12)), "osnet: images of 64 x 12 pixels; allowed: 13 or more a side"),
])
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError) as fault:
        call()
    assert str(fault.value) == words

"""The ResNets against torchvision's, map by map, and their costs as integers."""

from functools import partial

import pytest
import torch
import torchvision
from reference_torchvision import dare_to_exit, outputs, randomised

from autoreid.backbones import resnet
from autoreid.cost import measure
from autoreid.errors import UserError

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("last_stride", [2, 1])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_every_stage_equals_torchvisions(name, last_stride):
    theirs = randomised(torchvision.models.get_model(name))
    if last_stride == 1:
        for conv in theirs.layer4[0].modules():
            if isinstance(conv, torch.nn.Conv2d):
                conv.stride = (1, 1)
    ours = getattr(resnet, name)(last_stride=last_stride).eval()
    ours.load_state_dict(ours.from_torchvision(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 40)
    with torch.no_grad():
        maps = list(ours.stages(images))
        torch.testing.assert_close(maps, outputs(theirs, LAYERS, images), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(images), maps[-1])
    assert tuple(x.shape[1] for x in maps) == ours.stage_channels and ours.stage_channels[-1] == ours.channels
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 10), (8, 5), (4, 3), (4, 3) if last_stride == 1 else (2, 2)]


# torchvision's parameters less the 1000-way classifier; MACs at 256 x 128. With last_stride=1 what the last stage
# computes at 8 x 4 is computed at 16 x 8: these weights, in units of 512 x 512, 3 x 32 times more
@pytest.mark.parametrize(("name", "params", "macs", "weights"), [
    ("resnet18", 11_689_512 - 513_000, 1_184_366_592, 9 / 2 + 1 / 2 + 3 * 9),
    ("resnet34", 21_797_672 - 513_000, 2_392_326_144, 9 / 2 + 1 / 2 + 5 * 9),
    ("resnet50", 25_557_032 - 2_049_000, 2_669_150_208, 9 + 4 + 8 + 2 * (4 + 9 + 4)),  # not the first 1 x 1
])
def test_costs(name, params, macs, weights):
    found = measure(getattr(resnet, name), (256, 128))
    assert (found.params, found.macs) == (params, macs)
    wide = measure(lambda: getattr(resnet, name)(last_stride=1), (256, 128))
    assert (wide.params, wide.macs) == (params, macs + 3 * 32 * weights * 512 * 512)


def test_costs_of_dares_exits():  # cumulative, own head included; 27,977,284 parameters with all heads
    found = [measure(partial(dare_to_exit, resnet.resnet50, number), (256, 128)) for number in (1, 2, 3, 4)]
    assert [cost.macs for cost in found] == [513_671_168, 1_185_021_952, 2_141_847_552, 2_671_378_432]
    assert {cost.params for cost in found} == {27_977_284}


def test_a_caller_that_stops_reading_stops_the_computation():
    net, run = resnet.resnet18(width=2), []
    for number, layer in enumerate(net.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    stages = net.stages(torch.randn(2, 3, 64, 32))
    assert run == []
    next(stages)
    next(stages)
    assert run == [1, 2]


@pytest.mark.parametrize(("options", "size", "shape"), [
    ({}, (37, 19), (2, 1)),
    ({}, (1, 1), (1, 1)),
    ({"stem": 3}, (37, 19), (3, 2)),
    ({"stem": 3, "last_stride": 1}, (37, 19), (5, 3)),
])
def test_any_size_and_every_parameter_learns(options, size, shape):
    net = resnet.resnet18(width=3, **options)
    x = net(torch.randn(2, 3, *size))
    assert x.shape == (2, 24, *shape) and net.stage_channels == (3, 6, 12, 24)
    (x * torch.randn_like(x)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(("options", "given"), [
    ({"width": 0}, "width=0, last_stride=2, stem=7"),
    ({"last_stride": 3}, "width=64, last_stride=3, stem=7"),
    ({"stem": 5}, "width=64, last_stride=2, stem=5"),
])
def test_mistakes_are_named(options, given):
    with pytest.raises(UserError) as fault:
        resnet.resnet50(**options)
    assert str(fault.value) == f"resnet: {given}; allowed: width 1 to 4096, last_stride 1 or 2, stem 3 or 7"

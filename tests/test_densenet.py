"""DenseNet-201 against torchvision's, DaRe's four taps, and their costs as integers."""

from functools import partial

import pytest
import torch
import torchvision
from reference_torchvision import dare_to_exit, outputs, randomised
from torch import nn

from autoreid.backbones import densenet
from autoreid.backbones.densenet import DenseNet
from autoreid.cost import measure
from autoreid.errors import UserError

BLOCKS = [f"features.denseblock{i}" for i in (1, 2, 3)]


def small(taps=True) -> DenseNet:
    return DenseNet((2, 1, 3, 2), growth=4, width=6, taps=taps)


def test_every_tap_equals_torchvisions_map_under_its_norm():
    theirs, ours = randomised(torchvision.models.densenet201()), randomised(densenet.densenet201())
    ours.load_state_dict(ours.from_torchvision(theirs.state_dict()), strict=False)
    images = torch.randn(2, 3, 64, 40)
    *blocks, last = outputs(theirs, [*BLOCKS, "features"], images)
    expected = []
    for block, tap in zip(blocks, ours.taps.values()):  # before the transition, batch norm by its formula
        norm = tap[0]
        mean, var, scale, shift = (v.reshape(1, -1, 1, 1) for v in (
            norm.running_mean, norm.running_var, norm.weight, norm.bias))
        expected.append(((block - mean) / (var + norm.eps).sqrt() * scale + shift).clamp(min=0))
    with torch.no_grad():
        maps = list(ours.stages(images))
        torch.testing.assert_close(maps, [*expected, last.clamp(min=0)], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(images), maps[-1])
    assert [tuple(x.shape[1:]) for x in maps] == [(256, 16, 10), (512, 8, 5), (1792, 4, 2), (1920, 2, 1)]
    assert ours.stage_channels == (256, 512, 1792, 1920) and ours.channels == 1920


def test_without_taps_the_maps_are_the_blocks_own():
    theirs = randomised(torchvision.models.DenseNet(4, (2, 1, 3, 2), 6))
    ours = small(taps=False).eval()
    ours.load_state_dict(ours.from_torchvision(theirs.state_dict()))
    images = torch.randn(1, 3, 70, 35)
    *blocks, last = outputs(theirs, [*BLOCKS, "features"], images)
    with torch.no_grad():
        torch.testing.assert_close(list(ours.stages(images)), [*blocks, last.clamp(min=0)], rtol=1e-5, atol=1e-5)


def test_costs():
    plain = measure(lambda: densenet.densenet201(taps=False), (256, 128))
    assert (plain.params, plain.macs) == (20_013_928 - 1_921_000, 2_801_270_784)  # torchvision's less its classifier
    tapped = measure(densenet.densenet201, (256, 128))
    assert tapped.params - plain.params == 2 * (256 + 512 + 1792) and tapped.macs == plain.macs


def test_costs_of_dares_exits():  # cumulative, own head included; 23,222,660 parameters with all heads
    found = [measure(partial(dare_to_exit, densenet.densenet201, number), (256, 128)) for number in (1, 2, 3, 4)]
    assert [cost.macs for cost in found] == [756_940_800, 1_289_879_552, 2_377_515_008, 2_803_367_936]
    assert {cost.params for cost in found} == {23_222_660}


def test_a_caller_that_stops_reading_stops_the_computation():
    net, run = small(), []
    for name, module in net.features.named_children():
        module.register_forward_hook(lambda *_, name=name: run.append(name))
    stages = net.stages(torch.randn(2, 3, 64, 64))
    next(stages)
    assert run[-1] == "denseblock1"
    next(stages)
    assert run[-2:] == ["transition1", "denseblock2"]


@pytest.mark.parametrize("size", [(32, 32), (37, 65)])
def test_every_parameter_learns(size):
    plain, tapped = small(taps=False), small()
    x = plain(torch.randn(2, 3, *size))
    (x * torch.randn_like(x)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    loss = sum((x * torch.randn_like(x)).sum() for x in tapped.stages(torch.randn(2, 3, *size)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tapped.parameters())


def test_both_modes_give_maps_of_one_shape():
    net = small()
    shapes = [[x.shape for x in net.train(mode).stages(torch.randn(2, 3, 64, 32))] for mode in (True, False)]
    assert shapes[0] == shapes[1] and isinstance(net.taps["denseblock1"][0], nn.BatchNorm2d)


def test_a_picture_too_small_is_named():
    with pytest.raises(UserError) as fault:
        small()(torch.randn(2, 3, 64, 31))
    assert str(fault.value) == (
        "densenet: the picture is 64 x 31; both sides must be 32 pixels or more: give a larger input size")

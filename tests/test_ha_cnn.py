"""HA-CNN: exact counts, equality with a slow twin, where the regions lie, gradient to every parameter."""

import math

import pytest
import reference_ha_cnn as reference
import torch
from torch import nn

from autoreid.backbones.ha_cnn import (
    HEAD,
    EachRegion,
    HardAttention,
    HarmoniousNet,
    InceptionA,
    InceptionB,
    SoftAttention,
    ha_cnn,
    inception_stage,
    resized,
    sample_regions,
)
from autoreid.cost import measure
from autoreid.errors import UserError
from autoreid.heads import ReIDNet

SMALL = {"stem": 6, "channels": (8, 12, 16)}


def unsettled(module: nn.Module) -> nn.Module:
    """Eval mode, with batch norms that have seen something and attention that looks at its input."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, 0.0, 0.5)
        if isinstance(m, HardAttention):
            nn.init.normal_(m.centres.weight)
    return module.eval()


def region_sizes(net: HarmoniousNet, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """What the local blocks are given."""
    seen = []
    for blocks in net.local:
        blocks.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[3:])))
    net.streams(torch.empty(1, 3, *size, device=net.stem[0].weight.device))
    return seen


# ---------------------------------------------------------------------------------------- counts and shapes
@pytest.mark.parametrize(("conv_bias", "params", "macs_all"), [
    (True, 2_929_112, 553_300_970),  # 2.93 M and 0.54 GMAC: torchreid's structure without its classifiers
    (False, 2_923_458, 550_975_392),  # 5,654 output channels of convolutions fewer
])  # fmt: skip
def test_counts(conv_bias, params, macs_all):
    cost = measure(lambda: ReIDNet(ha_cnn(conv_bias=conv_bias), **HEAD), (160, 64))
    assert (cost.params, cost.macs, cost.macs_all) == (params, 543_994_538, macs_all)


def test_maps_at_the_papers_size():
    with torch.device("meta"):
        net = ha_cnn().eval()
        images = torch.empty(2, 3, 160, 64)
        maps = list(net.stages(images))
        assert [tuple(m.shape) for m in maps] == [(2, 128, 40, 16), (2, 256, 20, 8), (2, 384, 10, 4)]
        whole, local = net.streams(images)
        assert whole.shape == net(images).shape == (2, 384, 10, 4) and local.shape == (2, 4, 384, 3, 4)
        assert (net.stage_channels, net.channels, net.regions) == ((128, 256, 384), 384, 4)
        assert region_sizes(net, (160, 64)) == [(24, 28), (12, 14), (6, 7)]


@pytest.mark.parametrize(("size", "regions"), [
    ((256, 128), [(38, 56), (19, 28), (10, 14)]),  # .3 and .875 of 128x64, 64x32, 32x16
    ((50, 30), [(8, 13), (4, 7), (2, 4)]),  # of 25x15, 13x8, 7x4
    ((1, 1), [(1, 1)] * 3),
])  # fmt: skip
def test_any_input_size(size, regions):
    net = ha_cnn(**SMALL).eval()
    assert region_sizes(net, size) == regions
    assert all(torch.isfinite(m).all() for m in net.streams(torch.randn(2, 3, *size)))


# ---------------------------------------------------------------------------------------- twins
@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 1)])
def test_inception_blocks_equal_their_twins(size):
    x = torch.randn(5, *size)
    a = unsettled(InceptionA(5, 8))
    torch.testing.assert_close(a(x[None])[0], reference.inception_a(x, a), atol=1e-6, rtol=1e-5)
    for stride in (1, 2):
        b = unsettled(InceptionB(5, 12, stride))
        torch.testing.assert_close(b(x[None])[0], reference.inception_b(x, b, stride), atol=1e-6, rtol=1e-5)
        assert b(x[None]).shape[1:] == (12, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 1)])
def test_soft_attention_equals_its_twin(size):
    attention, x = unsettled(SoftAttention(32)), torch.randn(32, *size)
    ours = attention(x[None])[0]
    torch.testing.assert_close(ours, reference.soft_attention(x, attention), atol=1e-6, rtol=1e-5)
    assert 0.5 <= ours.min() < ours.max() < 1
    assert attention.channel[0][0].out_channels == 2  # a sixteenth


def test_hard_attention_starts_with_the_same_stripes_for_every_image():
    centres = HardAttention(8)(torch.randn(3, 8, 4, 2))
    heights = [math.tanh(y) for y in (-0.75, -0.25, 0.25, 0.75)]
    torch.testing.assert_close(centres, torch.tensor([[[0.0, y] for y in heights]] * 3))


@pytest.mark.parametrize(("maps", "size"), [((9, 6), (4, 5)), ((5, 4), (7, 6)), ((8, 3), (1, 1)), ((1, 1), (2, 3))])
def test_regions_equal_their_twin(maps, size):
    x = torch.randn(2, 3, *maps)
    centres = torch.rand(2, 4, 2) * 2 - 1  # some reach far outside the map
    ours = sample_regions(x, centres, size)
    assert ours.shape == (2, 4, 3, *size)
    for b in range(2):
        for r in range(4):
            twin = reference.region(x[b], centres[b, r].tolist(), *size)
            torch.testing.assert_close(ours[b, r], twin, atol=1e-5, rtol=1e-5)


def test_a_region_by_hand():
    # rows 0..8 hold their number: a quarter to each side of the middle is rows 3, 4, 5; below the map there is nothing
    x = torch.arange(9.0)[None, None, :, None].expand(1, 1, 9, 3)
    cut = sample_regions(x, torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]), (3, 3))
    assert cut[0, 0, 0].tolist() == [[3.0] * 3, [4.0] * 3, [5.0] * 3]
    assert cut[0, 1, 0].tolist() == [[7.0] * 3, [8.0] * 3, [0.0] * 3]
    assert cut[0, 2, 0].tolist() == [[3.0, 3.0, 0.0], [4.0, 4.0, 0.0], [5.0, 5.0, 0.0]]


def test_local_maps_of_twice_the_size_are_averaged_two_by_two():
    local = torch.randn(2, 4, 3, 6, 8)
    means = local.unflatten(4, (4, 2)).unflatten(3, (3, 2)).mean((4, 6))
    torch.testing.assert_close(resized(local, (3, 4)), means)
    assert resized(local, (6, 8)) is local


def test_the_gradient_of_a_regions_centre():
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    centres = (torch.rand(2, 4, 2, dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: sample_regions(x, c, (3, 4)), (x, centres))


@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_net_equals_its_twin(shared):
    net = HarmoniousNet(
        6, (8, 8, 12), lambda number, cin, cout: inception_stage(cin, cout, number, True), InceptionB, shared_local=shared
    )
    unsettled(net)
    images = torch.randn(2, 3, 40, 16)
    whole, local = net.streams(images)
    torch.testing.assert_close(whole, net(images), atol=0, rtol=0)
    for image, ours_g, ours_l in zip(images, whole, local):
        twin_g, twin_l = reference.streams(
            image, net, reference.inception_stage, reference.inception_b, [(6, 7), (3, 4), (2, 2)]
        )
        torch.testing.assert_close(ours_g, twin_g, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_l, twin_l, atol=1e-5, rtol=1e-5)
    # the four regions differ, and look elsewhere in the other image
    assert all((local[0, 0] - other).abs().max() > 1e-3 for other in (*local[0, 1:], local[1, 0]))


# ---------------------------------------------------------------------------------------- behaviour
def test_who_stops_reading_stops_the_computation():
    net, ran = ha_cnn(**SMALL), []
    for number, layer in enumerate(net.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    next(iter(net.stages(torch.randn(2, 3, 32, 16))))
    assert ran == [0]


def test_regions_share_one_batch_of_statistics():
    shared, apart = EachRegion([nn.BatchNorm2d(2)]), EachRegion(nn.BatchNorm2d(2) for _ in range(4))
    regions = torch.randn(3, 4, 2, 5, 5) + torch.arange(4.0)[:, None, None, None]
    together = shared(regions).transpose(1, 2).flatten(2)  # B x C x ...
    torch.testing.assert_close(together.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    assert shared[0].num_batches_tracked == 1
    torch.testing.assert_close(apart(regions).mean((0, 3, 4)), torch.zeros(4, 2), atol=1e-5, rtol=0)


def test_every_parameter_gets_gradient():
    net, images = ha_cnn(16, (32, 48, 64)), torch.randn(8, 3, 64, 32)
    for attention in net.hard:
        assert not attention.centres.weight.any()  # it starts at zero, and must leave it
    # the batch's own statistics, held fast: in train mode a norm takes a bias before it away, and so its gradient
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    net.streams(images)
    whole, local = net.eval().streams(images)
    ((whole * torch.randn_like(whole)).sum() + (local * torch.randn_like(local)).sum()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(attention.centres.weight.grad.abs().max() > 1e-2 for attention in net.hard)


def test_the_same_maps_in_both_modes_and_a_training_step():
    net, images = ha_cnn(**SMALL), torch.randn(4, 3, 64, 32)
    for mode in (False, True):
        whole, local = net.train(mode).streams(images)
        assert whole.shape == net(images).shape == (4, 16, 4, 2) and local.shape == (4, 4, 16, 1, 2)
    (whole.square().sum() + local.square().sum()).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    assert all(attention.centres.weight.any() for attention in net.hard)


def test_half_precision():
    net, images = unsettled(ha_cnn(**SMALL)), torch.randn(2, 3, 80, 32)
    full = net.streams(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net.streams(images)
    half = net.bfloat16().streams(images.bfloat16())
    for f, m, h in zip(full, mixed, half):
        assert h.dtype == torch.bfloat16
        torch.testing.assert_close(m.float(), f, atol=0.1, rtol=0.1)
        torch.testing.assert_close(h.float(), f, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("options", "given"), [
    ({"channels": (128, 254)}, "stem=32, channels=(128, 254)"),
    ({"channels": (0, 8, 8)}, "stem=32, channels=(0, 8, 8)"),
    ({"channels": ()}, "stem=32, channels=()"),
    ({"stem": 0}, "stem=0, channels=(128, 256, 384)"),
])  # fmt: skip
def test_bad_sizes_are_named(options, given):
    with pytest.raises(UserError) as fault:
        ha_cnn(**options)
    assert str(fault.value) == (
        f"{given}: allowed are a stem from 1 and multiples of 4, one a stage, as in stem=32, channels=128,256,384"
    )

"""ShuffleNetV2+ against its published size, as integers, and against the slow network of the reference."""

import pytest
import torch
from reference_shufflenet_v2_plus import CHANNELS, Tensors, block, hard_swish, relu, shufflenet_v2_plus, squeeze_excite
from torch import nn

from autoreid.backbones.shufflenet_v2_plus import (
    XCEPTION,
    ShuffleBlock,
    SqueezeExcite,
    shufflenet_v2_plus_large,
    shufflenet_v2_plus_medium,
    shufflenet_v2_plus_small,
)
from autoreid.cost import measure
from autoreid.errors import UserError

SIZES = {"small": shufflenet_v2_plus_small, "medium": shufflenet_v2_plus_medium, "large": shufflenet_v2_plus_large}


def settled(module, *shape):
    """In eval mode and float64, with norms that scale and shift, and averages taken from one random batch."""
    module = module.double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.momentum = 1
    module.train()(torch.randn(*shape, dtype=torch.float64))
    return module.eval()


@pytest.mark.parametrize(("size", "params", "macs"), [
    ("small", 5_137_116, 155_845_008),  # the authors' README: 5.1 M, 156 M
    ("medium", 5_679_840, 222_249_984),  # 5.6 M, 222 M
    ("large", 6_768_220, 360_050_704),  # 6.7 M, 360 M
])
def test_published_counts(size, params, macs):
    cost = measure(
        lambda: nn.Sequential(SIZES[size](tail="published"), nn.Flatten(), nn.Linear(1280, 1000, bias=False)), (224, 224)
    )
    assert (cost.params, cost.macs) == (params, macs)


def test_the_tail_is_all_that_the_option_adds():
    none = measure(shufflenet_v2_plus_small, (224, 224))
    published = measure(lambda: shufflenet_v2_plus_small(tail="published"), (224, 224))
    squeeze, fc = 2 * 1280 * 320, 1280 * 1280
    assert published.params - none.params == squeeze + 2 * 320 + fc
    assert published.macs - none.macs == squeeze + fc


def test_stage_maps():
    for size, build in SIZES.items():
        with torch.device("meta"):
            net = build().eval()
            shapes = [tuple(x.shape[1:]) for x in net.stages(torch.empty(1, 3, 224, 160))]
        assert shapes == list(zip([*CHANNELS[size][:3], 1280], [56, 28, 14, 7], [40, 20, 10, 5]))
        assert net.stage_channels == tuple(channels for channels, _, _ in shapes) and net.channels == 1280


# ---------------------------------------------------------------------------------------- against the slow network
@pytest.mark.parametrize("tail", ["none", "published"])
def test_every_map_equals_the_slow_network(tail):
    net = settled(shufflenet_v2_plus_small(tail), 4, 3, 64, 64)
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    expected = shufflenet_v2_plus(net.state_dict(), images, tail == "published")
    maps = list(net.stages(images))
    assert len(maps) == 4
    for found, slow in zip(maps, expected):
        assert slow.std() > 0.05
        torch.testing.assert_close(found, slow, rtol=1e-8, atol=1e-10)
    assert torch.equal(net(images), maps[-1])


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize(("activation", "slow"), [(nn.ReLU, relu), (nn.Hardswish, hard_swish)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2), (XCEPTION, 1)])
def test_blocks(kernel, stride, activation, slow, squeeze):
    channels_out = 12 if stride == 1 else 20
    net = settled(ShuffleBlock(12, channels_out, kernel, stride, activation, squeeze), 4, 12, 9, 8)
    x, tensors = torch.randn(2, 12, 9, 7, dtype=torch.float64), Tensors(net.state_dict())
    expected = block(tensors, x, "x" if kernel == XCEPTION else kernel, stride, slow, squeeze)
    assert not tensors.rest
    torch.testing.assert_close(net(x), expected)


def test_half_of_the_channels_pass_a_block_of_stride_1():
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(ShuffleBlock(8, 8, 3, 1, nn.ReLU, False).eval()(x)[:, :4], x[:, [0, 2, 4, 6]])


def test_squeeze_excite():
    net = settled(SqueezeExcite(8), 4, 8, 5, 5)
    x = torch.randn(3, 8, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), squeeze_excite(Tensors(net.state_dict()), x))


# ---------------------------------------------------------------------------------------- the interface
@pytest.mark.parametrize("size", [(64, 32), (50, 31), (3, 5), (1, 1)])
def test_any_input_size_in_both_modes(size):
    net = shufflenet_v2_plus_small()
    for mode in (True, False):
        assert net.train(mode)(torch.randn(2, 3, *size)).shape == (2, 1280, -(-size[0] // 32), -(-size[1] // 32))


@pytest.mark.parametrize("tail", ["none", "published"])
def test_every_parameter_gets_a_gradient(tail):
    net = shufflenet_v2_plus_small(tail)
    y = net(torch.randn(4, 3, 64, 64))
    (y * torch.randn_like(y)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_who_stops_reading_stops_the_computation():
    net, ran = shufflenet_v2_plus_small().eval(), []
    for number, layer in enumerate(net.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    maps = net.stages(torch.randn(1, 3, 32, 32))
    assert next(maps).shape[1] == 36 and ran == [0]
    assert next(maps).shape[1] == 104 and ran == [0, 1]


def test_an_unknown_tail_is_named():
    with pytest.raises(UserError) as fault:
        shufflenet_v2_plus_large(tail="publish")
    assert str(fault.value) == "unknown tail 'publish'; did you mean 'published'? known: none, published"

"""Every operation's shapes at any size, its parameters by formula, and the part-aware module against its twin."""

import pytest
import torch
from reference import LiteralPartAware

from autoreid.genotype import OPERATIONS
from autoreid.ops import OPS, FactorizedReduce, PartAware, Stripes, stripe_bounds

SIZES = [(16, 8), (12, 4), (5, 7), (3, 3), (2, 2), (1, 1), (9, 1)]


def test_the_table_has_every_operation_a_genotype_may_name():
    assert sorted(OPS) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("searching", [False, True])
def test_shapes_and_gradients(name, searching):
    for stride in (1, 2):
        op = OPS[name](6, stride, searching, Stripes())
        for height, width in SIZES:
            x = torch.randn(2, 6, height, width, requires_grad=True)
            y = op(x)
            assert y.shape == (2, 6, -(-height // stride), -(-width // stride)), (stride, height, width)
            y.square().sum().backward()
            assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("channels", [6, 64])
def test_parameters_by_formula(channels):
    c, h = channels, channels // 3
    expected = {
        "sep_conv_3x3": 2 * (9 * c + c * c + 2 * c),
        "sep_conv_5x5": 2 * (25 * c + c * c + 2 * c),
        "dil_conv_3x3": 9 * c + c * c + 2 * c,
        "dil_conv_5x5": 25 * c + c * c + 2 * c,
        "max_pool_3x3": 0,
        "avg_pool_3x3": 0,
        "identity": 0,
        "part_aware": 4 * (c * h + h + 2 * h) + 2 * (h * h + h) + (c + h) * c + 2 * c,
    }
    for name, count in expected.items():
        op = OPS[name](c, 1, False, Stripes())
        assert sum(p.numel() for p in op.parameters()) == count, name
    assert sum(p.numel() for p in OPS["identity"](c, 2, False, Stripes()).parameters()) == c * c + 2 * c


def test_searching_turns_affine_off_and_norms_pooling():
    for name in OPS:
        kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
        norms = [m for m in OPS[name](6, 2, True, Stripes()).modules() if isinstance(m, kinds)]
        assert norms and not any(norm.affine for norm in norms), name
    assert not list(OPS["max_pool_3x3"](6, 1, False, Stripes()).buffers())


def test_stripes_cover_every_row_once():
    for length in range(1, 20):
        for parts in (1, 2, 4, 6):
            bounds = stripe_bounds(length, parts)
            rows = [row for low, high in bounds for row in range(low, high)]
            assert rows == list(range(length)) and all(high > low for low, high in bounds)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parts", [4, 3])
def test_part_aware_equals_the_literal_form(axis, stride, size, parts):
    """Split convolution, stripe by stripe, against concat + 1 x 1 convolution: values and gradients."""
    torch.manual_seed(1)
    module = PartAware(6, stride, True, Stripes(parts, axis)).double()
    x = torch.randn(3, 6, *size, dtype=torch.double, requires_grad=True)
    probe = torch.randn(3, 6, -(-size[0] // stride), -(-size[1] // stride), dtype=torch.double)
    outputs = []
    for forward in (module, LiteralPartAware(module)):
        module.zero_grad()
        x.grad = None
        y = forward(x)
        (y * probe).sum().backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        outputs.append([y.detach(), x.grad.clone(), *grads])
    for fast, slow in zip(*outputs, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)


def test_factorized_reduce_reads_every_second_pixel_twice():
    """An image of one bright pixel reaches the first half of the channels from even, the second from odd places."""
    reduce = FactorizedReduce(1, 2, affine=False).eval()
    for weight in reduce.parameters():
        torch.nn.init.ones_(weight)
    for place in range(4):
        x = torch.zeros(1, 1, 4, 4)
        x[0, 0, place, place] = 1
        seen = (reduce(x)[0] > 0).nonzero().tolist()
        assert seen == [[place % 2, place // 2, place // 2]]

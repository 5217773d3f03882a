"""Robust-ReID: exact counts, equality with slow twins, the ablation's nine columns."""

import inspect

import pytest
import reference_ha_cnn
import reference_robust_reid as reference
import torch
from torch import nn

from autoreid.backbones.ha_cnn import HardAttention
from autoreid.backbones.robust_reid import (
    ABLATIONS,
    HEAD_1X,
    HEAD_2X,
    ShuffleA,
    ShuffleB,
    channel_shuffle,
    robust_reid_1x,
    robust_reid_2x,
)
from autoreid.cost import measure
from autoreid.errors import UserError
from autoreid.heads import ReIDNet

SMALL = {"stem": 6, "channels": (8, 12, 16), "repeats": (1, 2, 0)}


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


# ---------------------------------------------------------------------------------------- counts and shapes
# MAC + bias of convolutions + 2 per batch norm element + ReLU elements come to 716,729,298 and 1,680,592,374, the paper's
# 0.72 B and 1.68 B; cost.py's macs_all also adds the linear layers' biases: 3 x 8 of hard attention, 2 x 512 or 2 x 960.
@pytest.mark.parametrize(("build", "head", "options", "params", "macs", "macs_all"), [
    (robust_reid_1x, HEAD_1X, {}, 2_928_408, 682_665_130, 716_729_298 + 24 + 1024),
    (robust_reid_2x, HEAD_2X, {}, 5_785_371, 1_621_772_618, 1_680_592_374 + 24 + 1920),
    (robust_reid_1x, HEAD_1X, {"conv_bias": False}, 2_911_362, 682_665_130, 707_465_376),
    (robust_reid_2x, HEAD_2X, {"conv_bias": False}, 5_760_792, 1_621_772_618, 1_664_598_051),
    # the readings that the paper's figures rule out
    (robust_reid_1x, HEAD_1X, {"local_stride": 1}, 2_928_408, 725_275_306, 762_202_090),
    (robust_reid_2x, HEAD_2X, {"local_stride": 1}, 5_785_371, 1_713_145_802, 1_776_528_270),
    (robust_reid_1x, HEAD_1X, {"shared_local": False}, 3_545_112, 682_665_130, 716_730_346),
])  # fmt: skip
def test_counts(build, head, options, params, macs, macs_all):
    cost = measure(lambda: ReIDNet(build(**options), **head), (160, 64))
    assert (cost.params, cost.macs, cost.macs_all) == (params, macs, macs_all)


@pytest.mark.parametrize(("build", "head", "widths"), [
    (robust_reid_1x, HEAD_1X, (128, 256, 384)), (robust_reid_2x, HEAD_2X, (240, 320, 480)),
])  # fmt: skip
def test_maps_and_embedding_at_the_papers_size(build, head, widths):
    dim = head["embedding_dim"]
    with torch.device("meta"):
        net = ReIDNet(build(), **head).eval()
        images = torch.empty(2, 3, 160, 64)
        maps, seen = list(net.backbone.stages(images)), []
        assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip(widths, [(40, 16), (20, 8), (10, 4)])]
        for blocks in net.backbone.local:
            blocks.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
        assert net(images).shape == (2, 2 * dim)
    assert seen == [(2, 4, c, *s) for c, s in zip(widths, [(12, 14), (6, 7), (3, 4)])]
    assert net.backbone.stage_channels == widths and net.branch_dims == (dim, dim) and net.dims == 2 * dim


def test_depth_is_a_number():
    """One Shuffle-A more in a stage of width C: three biased convolutions and three batch norms of C/2 channels."""
    def params(repeats):
        with torch.device("meta"):
            return sum(p.numel() for p in robust_reid_1x(repeats=repeats).parameters())

    for stage, half in enumerate((64, 128, 192)):
        more = tuple(n + (k == stage) for k, n in enumerate((7, 10, 7)))
        assert params(more) - params((7, 10, 7)) == 2 * half * half + 9 * half + 3 * half + 3 * 2 * half


@pytest.mark.parametrize("options", [{}, {"local_stride": 1}, {"shared_local": False}, {"block": "inception"}])
@pytest.mark.parametrize("size", [(1, 1), (33, 17)])
def test_any_input_size(options, size):
    net = robust_reid_1x(**SMALL, **options).eval()
    whole, local = net.streams(torch.randn(2, 3, *size))
    assert whole.shape[:2] == (2, 16) and local.shape[:3] == (2, 4, 16)
    assert torch.isfinite(whole).all() and torch.isfinite(local).all()


# ---------------------------------------------------------------------------------------- twins
def test_channel_shuffle_by_hand():
    assert channel_shuffle(torch.arange(6.0)[None, :, None, None]).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 1)])
def test_shuffle_blocks_equal_their_twins(size):
    a, x = unsettled(ShuffleA(8)), torch.randn(8, *size)
    torch.testing.assert_close(a(x[None])[0], reference.shuffle_a(x, a), atol=1e-6, rtol=1e-5)
    assert torch.equal(a(x[None])[0, ::2], x[:4])  # half of the channels pass as they are
    for stride in (1, 2):
        b = unsettled(ShuffleB(8, 12, stride))
        torch.testing.assert_close(b(x[None])[0], reference.shuffle_b(x, b, stride), atol=1e-6, rtol=1e-5)
        assert b(x[None]).shape[1:] == (12, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_net_equals_its_twin(shared):
    net = unsettled(robust_reid_1x(**{**SMALL, "channels": (8, 8, 12)}, shared_local=shared))
    images = torch.randn(2, 3, 40, 16)
    whole, local = net.streams(images)
    sizes = [(6, 7), (3, 4), (2, 2)]
    for image, ours_g, ours_l in zip(images, whole, local):
        twin_g, twin_l = reference_ha_cnn.streams(image, net, reference.shuffle_stage, reference.shuffle_b, sizes)
        torch.testing.assert_close(ours_g, twin_g, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_l, twin_l, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"shared_local": False, "local_stride": 1}, {"block": "inception"}])
def test_every_parameter_gets_gradient(options):
    net = ReIDNet(robust_reid_2x(16, (32, 48, 64), (1, 2, 0), **options), **{**HEAD_2X, "embedding_dim": 64})
    images = torch.randn(8, 3, 64, 32)
    # the batch's own statistics, held fast: in train mode a norm takes a bias before it away, and so its gradient
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.momentum = 1.0
    net(images)
    embedding = net.eval()(images)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_both_losses_read_vectors_of_length_one():
    net, images = ReIDNet(robust_reid_1x(**SMALL), **{**HEAD_1X, "embedding_dim": 10}), torch.randn(4, 3, 32, 16)
    for mode in (True, False):
        branches = net.train(mode).branches(images)
        assert len(branches) == 2 and all(b.metric is b.classified for b in branches)
        for b in branches:
            torch.testing.assert_close(b.metric.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(net(images), torch.cat([b.metric for b in branches], dim=1))


# ---------------------------------------------------------------------------------------- the ablation
@pytest.mark.parametrize(("column", "params", "macs", "dims", "gem", "l2"), [
    ("a", 2_929_112, 543_994_538, 1024, 0, False),
    ("b", 5_785_371, 1_621_772_618, 1920, 960, False),
    ("c", 5_627_087, 1_238_042_570, 1920, 960, True),
    ("d", 5_785_371, 1_621_772_618, 1920, 960, True),
    ("e", 5_784_411, 1_621_772_618, 1920, 0, True),
    ("f", 2_928_408, 682_665_130, 1024, 768, True),
    ("g", 2_928_408, 682_665_130, 1024, 768, True),
    ("h", 5_785_371, 1_621_772_618, 1920, 960, True),
    ("full", 5_785_371, 1_621_772_618, 1920, 960, True),
])  # fmt: skip
def test_ablation_columns(column, params, macs, dims, gem, l2):
    build, head = ABLATIONS[f"robust-reid-{column}"]
    assert all(p.default is not p.empty for p in inspect.signature(build).parameters.values())
    with torch.device("meta"):
        net = ReIDNet(build(), **head)
    cost = measure(lambda: ReIDNet(build(), **head), (160, 64))
    assert (cost.params, cost.macs, net.dims) == (params, macs, dims)
    pooling = [p for name, p in net.head.named_parameters() if name.startswith("pooling")]
    assert sum(p.numel() for p in pooling) == gem
    # with the L2 neck both losses read one and the same vector of length one
    small = ReIDNet(build(**{k: v for k, v in SMALL.items() if k in inspect.signature(build).parameters}), **head)
    lengths = [b.classified.norm(dim=1) for b in small.branches(torch.randn(4, 3, 32, 16))]
    assert all(torch.allclose(n, torch.ones(4)) for n in lengths) == l2


def test_the_ablation_has_its_nine_columns():
    assert [name.removeprefix("robust-reid-") for name in ABLATIONS] == [*"abcdefgh", "full"]


# ---------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("build", [robust_reid_1x, robust_reid_2x])
@pytest.mark.parametrize(("options", "words"), [
    ({"block": "shufle"}, "unknown block 'shufle'; did you mean 'shuffle'? known: inception, shuffle"),
    ({"local_stride": 3}, "local_stride=3: allowed are 2 (the paper's map sizes) and 1 (its table's print)"),
    ({"channels": (8, 8), "repeats": (1, 1, 1)}, "repeats=(1, 1, 1), channels=(8, 8): allowed is one number from 0 for "
     "each stage, as in repeats=7,10,7 with channels=128,256,384"),
    ({"channels": (8, 8), "repeats": (1, -1)}, "repeats=(1, -1), channels=(8, 8): allowed is one number from 0 for "
     "each stage, as in repeats=7,10,7 with channels=128,256,384"),
    ({"stem": 3, "channels": (8, 10, 12)}, "stem=3, channels=(8, 10, 12): allowed are a stem from 1 and multiples of 4, "
     "one a stage, as in stem=32, channels=128,256,384"),
])  # fmt: skip
def test_mistakes_are_named(build, options, words):
    with pytest.raises(UserError) as fault:
        build(**options)
    assert str(fault.value) == words

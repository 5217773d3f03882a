"""Pooling, necks and the three heads, against slow twins and as integers."""

import pytest
import reference_heads
import torch
from torch import nn

from autoreid.errors import UserError
from autoreid.heads import FCS, NECKS, POOLINGS, ExitsHead, GeM, PooledHead, ReIDNet, StreamsHead


class Maps(nn.Module):
    """A backbone of random maps: three stages, or two streams with four regions."""

    def __init__(self):
        super().__init__()
        self.stage_channels, self.channels, self.regions = (3, 4, 6), 6, 4
        self.convs = nn.ModuleList(nn.Conv2d(3, c, 3, 2 + i, 1) for i, c in enumerate(self.stage_channels))

    def stages(self, images):
        for conv in self.convs:
            yield conv(images)

    def forward(self, images):
        *_, last = self.stages(images)
        return last

    def streams(self, images):
        x = self(images)
        return x, torch.stack([x[:, :, :2], x[:, :, 1:3], x[:, :, 2:4], x[:, :, 3:5]], dim=1)


def shaken(net):
    """Weights and running statistics away from their initial ones and zeros."""
    for value in (*net.parameters(), *net.buffers()):
        if value.dtype == torch.float32:
            value.data.uniform_(0.2, 0.9)
    for module in net.modules():
        if isinstance(module, GeM):
            module.p.data.uniform_(1.5, 4)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data.normal_()
    return net.eval()


@pytest.mark.parametrize("pooling", ["gem", "gem-channel"])
def test_gem_is_the_slow_twin(pooling):
    pool = shaken(POOLINGS[pooling](5))
    assert len(pool.p) == (5 if pooling == "gem-channel" else 1)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(pool(x), reference_heads.gem(x, pool.p))


def test_gem_between_average_and_max():
    x = torch.rand(2, 3, 4, 5) + 0.1
    for p, pooling in ((1.0, "average"), (80.0, "max")):
        torch.testing.assert_close(GeM(p=p)(x), POOLINGS[pooling](3)(x), rtol=0.05 if p > 1 else 1e-5, atol=1e-5)


def test_exits_are_the_slow_twin():
    net = shaken(ReIDNet(Maps(), "exits", hidden=7, embedding_dim=5))
    images = torch.randn(2, 3, 20, 12)
    maps = list(net.backbone.stages(images))
    *phis, phi = reference_heads.exits(net.head, maps)
    torch.testing.assert_close(net(images), phi)
    for b, wanted in zip(net.branches(images), [*phis, phi], strict=True):
        torch.testing.assert_close(b.metric, wanted)
    for exit_, wanted in zip(net.head.exits(maps), [*phis[:-1], phi], strict=True):  # the last exit gives the fusion
        torch.testing.assert_close(exit_, wanted)
    assert net.dims == 5 and net.branch_dims == (5,) * 4


def test_streams_are_the_slow_twin():
    net = shaken(ReIDNet(Maps(), "streams", embedding_dim=5))
    images = torch.randn(2, 3, 20, 12)
    torch.testing.assert_close(net(images), reference_heads.streams(net.head, *net.backbone.streams(images)))
    assert net.dims == 10 and net.branch_dims == (5, 5)


def test_l2_comes_before_both_losses_and_the_other_necks_between_them():
    images = torch.randn(4, 3, 20, 12)
    for neck in NECKS:
        for head in ({}, {"head": "exits", "hidden": 8}, {"head": "streams", "embedding_dim": 8}):
            net = ReIDNet(Maps(), neck=neck, **head).train()
            for b in net.branches(images):
                same = torch.equal(b.metric, b.classified)
                assert same == (neck in ("none", "l2", "l2-test"))
                assert torch.allclose(b.metric.norm(dim=1), torch.ones(4)) == (neck == "l2")
            if neck in ("l2", "l2-test"):
                streams = net.eval()(images).chunk(2, dim=1) if "embedding_dim" in head else [net.eval()(images)]
                assert all(torch.allclose(v.norm(dim=1), torch.ones(4)) for v in streams)


def test_the_embedding_is_what_the_classifier_reads():
    images = torch.randn(4, 3, 20, 12)
    net = ReIDNet(Maps(), embedding_dim=5, fc="norm-relu", neck="layer").eval()
    torch.testing.assert_close(net(images), net.branches(images)[0].classified)
    assert isinstance(net.head.embedding[2], nn.ReLU) and net(images).shape == (4, 5)


def test_dares_heads_have_the_papers_parameters():
    heads = ExitsHead(type("R50", (), {"stage_channels": (256, 512, 1024, 2048)})())
    assert sum(p.numel() for p in heads.parameters()) == 4_469_248 + 4


@pytest.mark.parametrize(("head", "options", "words"), [
    ("pool", {}, "unknown head 'pool'; did you mean 'pooled'? known: exits, pooled, streams"),
    ("pooled", {"pooling": "sum"}, "unknown pooling 'sum'; known: average, gem, gem-channel, max"),
    ("pooled", {"neck": "bn"}, "unknown neck 'bn'; known: batch, l2, l2-test, layer, none"),
    ("pooled", {"fc": "relu"}, "unknown fc 'relu'; did you mean 'norm-relu'? known: linear, norm-relu"),
    ("pooled", {"dropout": 1.0}, "dropout is 1.0; allowed: from 0 to below 1"),
    ("exits", {"hidden": 0}, "hidden is 0; allowed: 1 or more"),
    ("exits", {"embedding_dim": 0}, "embedding_dim is 0; allowed: 1 or more, or none"),
])
def test_mistakes_are_named(head, options, words):
    with pytest.raises(UserError) as fault:
        ReIDNet(Maps(), head, **options)
    assert str(fault.value) == words


def test_streams_need_a_backbone_that_has_them():
    backbone = nn.Conv2d(3, 8, 3)
    backbone.channels = 8
    with pytest.raises(UserError, match="^the head 'streams' needs a backbone with image regions: ha-cnn or robust-reid;"):
        StreamsHead(backbone)
    assert PooledHead(backbone).dims == 8 and set(FCS) == {"linear", "norm-relu"}

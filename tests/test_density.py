"""Activation density: counted by hand where the numbers are known, and against a walk over the network."""

import pytest
import torch
from torch import nn

from autoreid.backbones.densenet import DenseNet
from autoreid.backbones.osnet import osnet_x0_25
from autoreid.backbones.resnet import resnet18
from autoreid.backbones.safr import safr_large
from autoreid.density import Density, activation_density, groups_of, per_stage
from autoreid.errors import UserError
from autoreid.heads import ReIDNet
from autoreid.network import CellNet
from autoreid.space import SearchSpace


class Threshold(nn.Module):
    """Zero under its level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        return x * (x >= self.level)


class Planted(nn.Module):
    """Two stages that let through the pixels of at least 1, 2 (first stage) and 3 (second)."""

    def __init__(self):
        super().__init__()
        self.stem = Threshold(0.5)
        self.layers = nn.ModuleList([nn.Sequential(Threshold(1), Threshold(2)), nn.Sequential(Threshold(3))])

    def stages(self, images):
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
            yield x


def pictures(*values):
    """A batch of 1 x 3 x 1 x 4 pictures whose colour planes are alike."""
    return torch.tensor([[row] * 3 for row in values])[:, :, None, :]


BATCHES = [pictures([0.0, 1, 2, 3]), pictures([1.0, 1, 1, 2], [0.0, 0, 0, 3])]


def test_counted_by_hand():
    rows = activation_density(Planted(), iter(BATCHES))
    assert rows == [
        Density("stem", 3 * (3 + 4 + 1), 36), Density("stage1.1", 3 * (3 + 4 + 1), 36),
        Density("stage1.2", 3 * (2 + 1 + 1), 36), Density("stage2.1", 3 * (1 + 0 + 1), 36),
    ]  # fmt: skip
    assert [row.density for row in rows] == [24 / 36, 24 / 36, 12 / 36, 6 / 36]


def test_over_images_of_one_size_a_row_is_the_mean_over_images():
    each = [activation_density(Planted(), [image[None]]) for batch in BATCHES for image in batch]
    means = [sum(row.density for row in rows) / len(rows) for rows in zip(*each, strict=True)]
    assert [row.density for row in activation_density(Planted(), BATCHES)] == pytest.approx(means)


def test_stages_are_summed_by_element():
    rows = [Density("stem", 1, 2), Density("stage1.1", 1, 10), Density("stage1.2", 9, 30), Density("stage2", 4, 5)]
    assert per_stage(rows) == [Density("stem", 1, 2), Density("stage1", 10, 40), Density("stage2", 4, 5)]
    assert per_stage(rows)[1].density == 0.25  # not the mean of 0.1 and 0.3


def test_a_backbone_may_name_its_groups():
    net = Planted()
    net.groups = lambda: {"stage1.1": net.layers[0], "stage2.1": net.layers[1][0]}
    assert [row.group for row in activation_density(net, BATCHES)] == ["stage1.1", "stage2.1"]
    assert [row.nonzero for row in activation_density(net, BATCHES)] == [12, 6]
    net.groups = lambda: {"stage1.1": net.layers[0], "elsewhere": Threshold(0)}
    with pytest.raises(ValueError, match="groups that the stages never run: elsewhere"):
        activation_density(net, BATCHES)


def test_a_group_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Threshold(2)

        def groups(self):
            return {"stage1.1": self.block}

        def stages(self, images):
            yield self.block(self.block(images) + images)

    # 0 1 2 3 -> 0 0 2 3, and their sum 0 1 4 6 -> 0 0 4 6
    assert activation_density(Twice(), [BATCHES[0]]) == [Density("stage1.1", 12, 24)]


# ---------------------------------------------------------------------------------------- the networks
def walked(backbone, images):
    """The share of non-zero activations behind the stem's ReLU and behind each block, one after the other."""
    x, shares = images, []
    for module in backbone.stem:
        x = module(x)
        if isinstance(module, nn.ReLU):
            shares.append((x != 0).double().mean().item())
    for layer in backbone.layers:
        for block in layer:
            x = block(x)
            shares.append((x != 0).double().mean().item())
    return shares


@pytest.mark.parametrize(("build", "blocks"), [
    (lambda: resnet18(width=8), (2, 2, 2, 2)),
    (lambda: resnet18(width=8, stem=3), (2, 2, 2, 2)),
    (lambda: safr_large(width=16), (3, 4, 6, 3)),
])  # fmt: skip
def test_residual_networks_have_a_row_per_block(build, blocks):
    torch.manual_seed(0)
    net = ReIDNet(build()).eval()
    images = torch.randn(3, 3, 48, 32)
    rows = activation_density(net, [images])
    names = [f"stage{i}.{j}" for i, count in enumerate(blocks, 1) for j in range(1, count + 1)]
    assert [row.group for row in rows] == ["stem", *names]
    with torch.no_grad():
        assert [row.density for row in rows] == pytest.approx(walked(net.backbone, images))
    assert 0.1 < rows[0].density < 0.9  # before the pooling, which would hide most zeros
    assert [row.group for row in per_stage(rows)] == ["stem", "stage1", "stage2", "stage3", "stage4"]


def test_osnet_s_transitions_are_no_groups():
    rows = activation_density(osnet_x0_25(), [torch.randn(2, 3, 32, 16)])
    assert [row.group for row in rows] == [
        "stem", "stage1.1", "stage1.2", "stage2.1", "stage2.2", "stage3.1", "stage3.2", "stage4.1"
    ]  # fmt: skip
    # of 2 images, channels x places: 16 at half the size, two blocks of 64 at a fourth, of 96 at an eighth, ...
    elements = [16 * 16 * 8, 2 * 64 * 8 * 4, 2 * 96 * 4 * 2, 2 * 128 * 2 * 1, 128 * 2 * 1]
    assert [row.elements for row in per_stage(rows)] == [2 * count for count in elements]


def test_without_residual_blocks_the_stages_are_the_groups():
    dense = DenseNet((2, 2, 2, 2), growth=4, width=8, taps=True).eval()
    images = torch.randn(2, 3, 32, 32)
    rows = activation_density(dense, [images])
    with torch.no_grad():
        maps = list(dense.stages(images))
    assert [(row.group, row.nonzero, row.elements) for row in rows] == [
        (f"stage{i}", int((out != 0).sum()), out.numel()) for i, out in enumerate(maps, 1)
    ]
    cells = CellNet(SearchSpace.load("reid").random(0), channels=4, layers=(1, 1), stem="half")
    assert [row.group for row in activation_density(cells, [images])] == ["stem", "stage1", "stage2"]


def test_modes_hooks_and_statistics_stay_as_they_were():
    net = ReIDNet(resnet18(width=4))
    net.backbone.layers[1].eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def broken():
        yield torch.randn(2, 3, 32, 16)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        activation_density(net, broken())
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_groups_are_found_by_structure():
    assert list(groups_of(nn.Conv2d(3, 4, 1))) == []
    net = resnet18(width=4)
    groups = groups_of(net)
    assert groups["stem"] is net.stem[2] and groups["stage3.2"] is net.layers[2][1]
    small = resnet18(width=4, stem=3)
    assert groups_of(small)["stem"] is small.stem[2]


def test_no_images():
    with pytest.raises(UserError, match="activation density: there are no images to measure; give one or more"):
        activation_density(resnet18(width=4), [])

"""EMA and SWA against sums written out."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from autoreid.averaging import averaged
from autoreid.recipe import Recipe


def visited(rule: Recipe, steps: int):
    """The average after so many visits, and what was visited: weights and running means."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average, weights, means = averaged(net, rule), [], []
    for _ in range(steps):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(4, 3, 1, 1))
            net[1].running_mean.add_(torch.randn(4))
        net[1].num_batches_tracked += 1
        weights.append(net[0].weight.detach().clone())
        means.append(net[1].running_mean.clone())
        average.update_parameters(net)
    return average, weights, means


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_ema_is_the_recursion_with_a_short_sighted_beginning(decay):
    average, weights, means = visited(replace(Recipe(), ema=decay), 20)
    for values, found in ((weights, average.module[0].weight), (means, average.module[1].running_mean)):
        expected = values[0].double()  # the first update copies
        for t, value in enumerate(values[1:], start=1):
            d = min(decay, (1 + t) / (10 + t))
            expected = d * expected + (1 - d) * value
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert int(average.module[1].num_batches_tracked) == 20


def test_swa_is_the_plain_mean():
    average, weights, _ = visited(replace(Recipe(), swa_epochs=5), 5)
    torch.testing.assert_close(average.module[0].weight, torch.stack(weights).mean(0), rtol=1e-5, atol=1e-6)


def test_the_average_goes_on_from_its_state():
    rule = replace(Recipe(), ema=0.9)
    average, _, _ = visited(rule, 3)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other = averaged(net, rule)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    average.update_parameters(net), other.update_parameters(net)
    assert all(torch.equal(a, b) for a, b in zip(average.state_dict().values(), other.state_dict().values(), strict=True))


def test_no_average_where_the_recipe_asks_for_none():
    assert averaged(nn.Linear(2, 2), Recipe()) is None

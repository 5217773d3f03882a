"""SWAG's moments, samples and statistics against lists of numbers and against torch; the cyclic rate."""

import copy
import io
import statistics

import pytest
import reference
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from autoreid.errors import UserError
from autoreid.swag import LEAST_VARIANCE, SWAG, update_batch_norms


def make_net(width: int = 4) -> nn.Sequential:
    """Convolution, batch norm and a linear layer whose bias is frozen, as a BNNeck's is."""
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, 2)
    )
    net[-1].bias.requires_grad_(False)
    return net


def visit(net: nn.Module, seed: int) -> None:
    """Other weights, as after another cycle of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])


def visited(cycles: int) -> tuple[nn.Sequential, SWAG, list[list[float]]]:
    """A net, the SWAG of its weights after each of so many cycles, and these weights."""
    torch.manual_seed(0)
    net = make_net()
    swag, weights = SWAG(net), []
    for seed in range(cycles):
        visit(net, seed)
        swag.collect(net)
        weights.append(flat(net).tolist())
    return net, swag, weights


# ---------------------------------------------------------------------------------------- moments
@pytest.mark.parametrize("cycles", [1, 2, 15])
def test_moments_equal_those_of_the_lists(cycles):
    _, swag, weights = visited(cycles)
    means = torch.cat([mean.flatten() for mean in swag.means.values()])
    variances = torch.cat([swag.variance(name).flatten() for name in swag.means])
    columns = list(zip(*weights, strict=True))
    torch.testing.assert_close(means, torch.tensor([statistics.fmean(c) for c in columns]), rtol=1e-6, atol=1e-7)
    expected = torch.tensor([statistics.pvariance(c) for c in columns]).clamp(min=LEAST_VARIANCE)
    torch.testing.assert_close(variances, expected, rtol=1e-5, atol=1e-9)


def test_the_mean_is_that_of_torch_and_frozen_parameters_and_buffers_stay():
    torch.manual_seed(0)
    net = make_net()
    swag, averaged = SWAG(net), AveragedModel(net)
    for seed in range(5):
        visit(net, seed)
        net[-1].bias.data.zero_()
        swag.collect(net)
        averaged.update_parameters(net)
    net[-1].bias.data.fill_(7.0)
    net[0].running_mean.fill_(5.0)
    swag.mean_to(net)
    torch.testing.assert_close(flat(net), flat(averaged.module), rtol=1e-6, atol=1e-7)
    assert net[-1].bias.tolist() == [7.0, 7.0] and "5.bias" not in swag.means
    assert net[0].running_mean.tolist() == [5.0] * 3


def test_the_variance_of_large_weights_that_move_little_is_not_noise():
    net = nn.Linear(1, 1, bias=False)
    swag, values = SWAG(net), [100.0, 100.0 + 2**-10, 100.0 - 2**-10]
    for value in values:
        nn.init.constant_(net.weight, value)
        swag.collect(net)
    assert swag.variance("weight").item() == pytest.approx(statistics.pvariance(values), rel=1e-3)
    naive = torch.tensor(values).square().mean() - torch.tensor(values).mean().square()  # as published, in float32
    assert naive.item() != pytest.approx(statistics.pvariance(values), rel=0.5)


def test_moments_do_not_share_memory_with_the_net_and_half_precision_becomes_float32():
    net, swag, _ = visited(2)
    before = swag.means["1.weight"].clone()
    visit(net, 9)
    assert torch.equal(swag.means["1.weight"], before)
    half = make_net().bfloat16()
    swag = SWAG(half)
    swag.collect(half)
    assert {mean.dtype for mean in swag.means.values()} == {torch.float32}
    swag.mean_to(half)
    assert half[1].weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- samples
@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (0.25, 0.5), (0.0, 0.0)])
def test_a_sample_is_mean_plus_deviation_times_normal_noise(scale, factor):
    net, swag, weights = visited(3)
    swag.sample_to(net, scale, torch.Generator().manual_seed(5))
    noise = torch.randn(net[0].weight.shape, generator=torch.Generator().manual_seed(5))  # the first parameter
    columns = list(zip(*weights, strict=True))[:3]
    for i, column in enumerate(columns):
        expected = statistics.fmean(column) + factor * statistics.pstdev(column) * noise[i].item()
        assert net[0].weight[i].item() == pytest.approx(expected, abs=1e-6)


def test_samples_have_the_moments():
    net, swag, _ = visited(4)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2000):
        swag.sample_to(net, generator=generator)
        samples.append(net[-1].weight.detach().clone())
    stack = torch.stack(samples)
    deviation = swag.variance("5.weight").sqrt()
    assert ((stack.mean(0) - swag.means["5.weight"]).abs() < 5 * deviation / 2000**0.5).all()
    torch.testing.assert_close(stack.std(0), deviation, rtol=0.1, atol=0)


def test_samples_repeat_with_the_seed_and_leave_the_global_generator_and_gradients_alone():
    net, swag, _ = visited(3)
    state = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        swag.sample_to(net, generator=torch.Generator().manual_seed(seed))
        draws.append(flat(net))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_leaf for p in net.parameters()) and net[1].weight.requires_grad


def test_one_collection_has_the_least_variance():
    net, swag, weights = visited(1)
    assert all((swag.variance(name) == LEAST_VARIANCE).all() for name in swag.means)
    swag.sample_to(net)
    assert flat(net).tolist() == pytest.approx(weights[0], abs=1e-12)


# ---------------------------------------------------------------------------------------- state and mistakes
def test_a_resumed_swag_goes_on_exactly():
    net, whole, _ = visited(6)
    net, first, _ = visited(3)
    file = io.BytesIO()
    torch.save({"swag": first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["swag"]
    resumed = SWAG(make_net())
    resumed.load_state_dict(state)
    for seed in range(3, 6):
        visit(net, seed)
        resumed.collect(net)
    assert resumed.count == whole.count == 6
    for name in whole.means:
        assert torch.equal(resumed.means[name], whole.means[name])
        assert torch.equal(resumed.deviations[name], whole.deviations[name])
    assert state["count"] == 3 and not torch.equal(state["means"]["1.weight"], resumed.means["1.weight"])


def test_nothing_collected_and_another_network_are_named():
    net = make_net()
    swag = SWAG(net)
    for use in (swag.mean_to, swag.sample_to):
        with pytest.raises(UserError, match=r"^SWAG has collected no weights yet: train for at least one whole cycle$"):
            use(net)
    before = flat(net)
    words = r"^SWAG was made for another network: this net has 1.bias \(5,\), collected is \(4,\) \(5 parameters differ\);"
    with pytest.raises(UserError, match=words):
        swag.collect(make_net(width=5))
    assert swag.count == 0 and torch.equal(flat(net), before)
    net[-1].bias.requires_grad_(True)
    with pytest.raises(UserError, match=r"this net has 5.bias \(2,\), collected is none \(1 parameters differ\)"):
        swag.collect(net)
    with pytest.raises(UserError, match=r"the saved state has 1.bias \(5,\), collected is \(4,\)"):
        swag.load_state_dict(SWAG(make_net(width=5)).state_dict())
    for scale in (-0.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match=rf"^scale={scale}: allowed is 0 or more"):
            visited(1)[1].sample_to(net, scale)


# ---------------------------------------------------------------------------------------- batch norms
def test_batch_norm_statistics_are_the_means_over_batches_at_every_depth():
    torch.manual_seed(0)
    net = make_net()
    for norm in (net[0], net[2]):
        norm.running_mean.fill_(9.0)
    net.eval()
    batches = [torch.randn(size, 3, 4, 4) * size + 2 for size in (2, 3, 5)]
    weights = copy.deepcopy(dict(net.named_parameters()))
    update_batch_norms(net, ((images, torch.zeros(len(images))) for images in batches))

    def normalised(x: torch.Tensor) -> torch.Tensor:  # by the batch's own statistics, as in training
        mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt()

    inner = [net[1](normalised(x)).detach() for x in batches]
    for norm, inputs in ((net[0], batches), (net[2], inner)):
        means, variances = reference.batch_norm_statistics(inputs)
        torch.testing.assert_close(norm.running_mean, torch.tensor(means), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var, torch.tensor(variances), rtol=1e-5, atol=1e-5)
        assert norm.momentum == 0.1 and not norm.training
    assert all(torch.equal(weights[name], p) for name, p in net.named_parameters())
    assert not net.training


def test_no_batch_is_a_mistake_that_leaves_the_statistics():
    net = make_net()
    net[0].running_mean.fill_(9.0)
    with pytest.raises(UserError, match="there is no batch to take statistics from; give at least one"):
        update_batch_norms(net, iter(()))
    assert net[0].running_mean.tolist() == [9.0] * 3

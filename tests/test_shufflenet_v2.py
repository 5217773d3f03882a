"""ShuffleNetV2 against torchvision's, and its costs as integers."""

import pytest
import torch
import torchvision
from reference_torchvision import outputs, randomised

from autoreid.backbones import shufflenet_v2
from autoreid.cost import measure
from autoreid.errors import UserError

NAMES = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_equals_torchvisions(name):
    theirs, ours = randomised(torchvision.models.get_model(name)), getattr(shufflenet_v2, name)().eval()
    ours.load_state_dict(ours.from_torchvision(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 40)
    with torch.no_grad():
        maps = list(ours.stages(images))
        torch.testing.assert_close(maps, outputs(theirs, ["stage2", "stage3", "conv5"], images), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(images), maps[-1])
    assert tuple(x.shape[1] for x in maps) == ours.stage_channels and ours.stage_channels[-1] == ours.channels
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 5), (4, 3), (2, 2)]


# torchvision's parameters less the 1000-way classifier; MACs at 224 x 224, the paper's 41, 146, 299 and 591 M less the same
@pytest.mark.parametrize(("width", "params", "macs"), [
    (0.5, 1_366_792 - 1_025_000, 39_452_448),
    (1.0, 2_278_604 - 1_025_000, 143_883_992),
    (1.5, 3_503_624 - 1_025_000, 294_735_392),
    (2.0, 7_393_996 - 2_049_000, 581_205_464),
])
def test_costs(width, params, macs):
    found = measure(lambda: shufflenet_v2.shufflenet_v2(width), (224, 224))
    assert (found.params, found.macs) == (params, macs)


def test_a_caller_that_stops_reading_stops_the_computation():
    net, run = shufflenet_v2.ShuffleNetV2((1, 1, 1), (4, 4, 8, 8, 16)), []
    for name, module in net.named_children():
        module.register_forward_hook(lambda *_, name=name: run.append(name))
    stages = net.stages(torch.randn(2, 3, 64, 32))
    next(stages)
    assert run == ["conv1", "maxpool", "stage2"]
    next(stages)
    assert run[3:] == ["stage3"]


@pytest.mark.parametrize("size", [(1, 1), (37, 19)])
def test_any_size_and_every_parameter_learns(size):
    net = shufflenet_v2.ShuffleNetV2((2, 2, 2), (4, 4, 8, 8, 16))
    x = net(torch.randn(4, 3, *size))
    (x * torch.randn_like(x)).sum().backward()
    assert x.shape[1] == 16 and all(p.grad is not None for p in net.parameters())


def test_an_unknown_width_is_named():
    with pytest.raises(UserError) as fault:
        shufflenet_v2.shufflenet_v2(width=0.75)
    assert str(fault.value) == "shufflenet_v2: width=0.75; allowed: 0.5, 1.0, 1.5, 2.0"

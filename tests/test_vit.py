"""ViT-B/16 against torchvision's at its size, a small one against one written out by hand at any, and costs."""

import pytest
import torch
import torchvision
from reference_torchvision import randomised, resized, slow_vit

from autoreid.backbones.vit import ViT, vit_b16
from autoreid.cost import measure
from autoreid.errors import UserError


def small(embedding=12, grid=(3, 2), depth=8) -> ViT:
    net = randomised(ViT(embedding, grid, width=12, depth=depth, heads=3))
    torch.nn.init.normal_(net.class_token)
    torch.nn.init.normal_(net.encoder.pos_embedding)
    return net


def test_vit_b16_equals_torchvisions():
    theirs = randomised(torchvision.models.vit_b_16())
    torch.nn.init.normal_(theirs.class_token, std=0.1)
    theirs.heads = torch.nn.Identity()
    images = torch.randn(1, 3, 224, 224)
    with torch.device("meta"):  # made without storage: initialising 86 M weights once is enough
        ours, sliced = vit_b16(grid=(14, 14)).eval(), vit_b16(embedding=32, grid=(14, 14)).eval()
    with torch.no_grad():
        expected = theirs(images)
        for net, dims in ((ours, 768), (sliced, 32)):
            net.load_state_dict(net.from_torchvision(theirs.state_dict()), assign=True)
            torch.testing.assert_close(net(images), expected[:, :dims, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("picture", [(48, 32), (80, 16), (16, 48), (32, 64)])  # (48, 32) is the grid's own
def test_every_stage_at_any_size_equals_the_slow_twin(picture):
    net, images = small(embedding=5), torch.randn(2, 3, *picture)
    grid = (picture[0] // 16, picture[1] // 16)
    with torch.no_grad():
        tokens = slow_vit(net.state_dict(), images, resized(net.encoder.pos_embedding, (3, 2), grid), heads=3)
        expected = [tokens[1], tokens[3], tokens[5], tokens[-1][:, :5]]  # eight layers, four stages, the norm, the slice
        maps = list(net.stages(images))
        torch.testing.assert_close(maps, [x[..., None, None] for x in expected], rtol=1e-5, atol=1e-5)
        assert torch.equal(net(images), maps[-1])
    assert net.stage_channels == (12, 12, 12, 5) and net.channels == 5


def test_torchvisions_positions_are_interpolated_to_the_grid():
    net, state = small(), small(grid=(4, 4)).state_dict()
    found = net.from_torchvision(state)["encoder.pos_embedding"]
    torch.testing.assert_close(found, resized(state["encoder.pos_embedding"], (4, 4), (3, 2)), rtol=1e-5, atol=1e-6)
    same_number = small(grid=(8, 2)).from_torchvision(state)["encoder.pos_embedding"]  # 16 patches, but of a square
    torch.testing.assert_close(same_number, resized(state["encoder.pos_embedding"], (4, 4), (8, 2)), rtol=1e-5, atol=1e-6)
    own = net.state_dict()
    assert torch.equal(net.from_torchvision(own)["encoder.pos_embedding"], own["encoder.pos_embedding"])  # no square


# 85.75 M and 11.34 G, 85.80 M and 17.56 G; with 769,000 of the classifier torchvision's 86,567,656 parameters
@pytest.mark.parametrize(("options", "size", "params", "macs"), [
    ({}, (256, 128), 85_746_432, 11_338_795_008),
    ({"embedding": 32}, (256, 128), 85_746_432, 11_338_795_008),  # the slice is taken at the very end
    ({"grid": (14, 14)}, (224, 224), 86_567_656 - 769_000, 17_563_060_224),
    ({"grid": (14, 14)}, (256, 128), 86_567_656 - 769_000, 11_338_795_008),
])
def test_costs(options, size, params, macs):
    found = measure(lambda: vit_b16(**options), size)
    assert (found.params, found.macs) == (params, macs)


def test_the_macs_from_the_layers():
    n, c = 129, 768
    layer = n * c * 3 * c + 2 * n * n * c + n * c * c + 2 * n * c * 4 * c
    assert 128 * 3 * 16 * 16 * c + 12 * layer == 11_338_795_008


def test_a_caller_that_stops_reading_stops_the_computation():
    net, run = small(), []
    for number, layer in enumerate(net.encoder.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    next(net.stages(torch.randn(2, 3, 48, 32)))
    assert run == [1, 2]


@pytest.mark.parametrize("picture", [(48, 32), (64, 64)])
def test_every_parameter_learns(picture):
    net = small(embedding=4).train()
    x = net(torch.randn(2, 3, *picture))
    assert x.shape == (2, 4, 1, 1)
    (x * torch.randn_like(x)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(("size", "nearest"), [((250, 128), "256 x 128"), ((15, 33), "16 x 32"), ((7, 16), "16 x 16")])
def test_a_picture_that_patches_do_not_tile_is_named(size, nearest):
    with pytest.raises(UserError) as fault:
        small()(torch.randn(1, 3, *size))
    assert str(fault.value) == (
        f"vit: the picture is {size[0]} x {size[1]}; both sides must be multiples of 16: the nearest size is {nearest}")


@pytest.mark.parametrize(("options", "words"), [
    ({"embedding": 0}, "vit: embedding=0; allowed: 1 to 768, the dimensions of the class token"),
    ({"embedding": 769}, "vit: embedding=769; allowed: 1 to 768, the dimensions of the class token"),
    ({"grid": (16,)}, "vit: grid=16; allowed: two whole numbers from 1, the patches down and across, as in 16x8 for "
     "pictures of 256 x 128"),
    ({"grid": (0, 8)}, "vit: grid=0x8; allowed: two whole numbers from 1, the patches down and across, as in 16x8 for "
     "pictures of 256 x 128"),
])
def test_mistakes_are_named(options, words):
    with pytest.raises(UserError) as fault, torch.device("meta"):
        vit_b16(**options)
    assert str(fault.value) == words

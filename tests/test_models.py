"""Every model by its name: maps and embedding, gradient, eval mode, odd and small inputs, twenty steps of training, weights
on disk. What is peculiar to a family is in the family's own tests.
"""

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoreid import data
from autoreid.backbones import BACKBONES, OWN_HEADS
from autoreid.data import drawn
from autoreid.errors import UserError
from autoreid.loading import Augment, PKSampler, TrainLoader, relabel
from autoreid.network import find_model, known_models, load_weights, model_options, save_weights
from autoreid.recipe import RECIPES
from autoreid.train import Criterion, make_optimizer, set_rate

NAMES = [*BACKBONES, *(name for name in known_models() if name not in BACKBONES)]


def distinct(of_head) -> list[str]:
    """The first name of every network: several columns of Robust-ReID's table are one network under other recipes."""
    first: dict[str, str] = {}
    for name in NAMES:
        build, head = BACKBONES.get(name, name), OWN_HEADS.get(name, {})
        fixed = (build.func, build.keywords) if isinstance(build, partial) else (build, {})
        first.setdefault(repr((*fixed, of_head(head))), name)
    return list(first.values())


NETWORKS = distinct(dict)
BODIES = distinct(lambda head: head.get("head", "pooled"))  # other poolings and necks are not told apart


def small(name: str) -> dict:
    """Options that make a network of real values cheap; its structure stays."""
    if name == "vit-b16":
        return {"grid": "2,1"}
    if name not in BACKBONES:
        return {"channels": 8}
    return {"width": 16} if "width" in model_options(BACKBONES[name]) else {}


def small_size(name: str) -> tuple[int, int]:
    return (32, 16) if name == "vit-b16" else (64, 32)  # 86 M parameters, and no width to lower


def settle(net: nn.Module, images: Tensor) -> None:
    """Give every batch norm the statistics of these images, and hold them."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(images)
    for norm in norms:
        norm.eval()


# ---------------------------------------------------------------------------------------- maps and embedding
STRIDES = {  # of the stages' maps, where they are not 4, 8, 16, 32
    "shufflenet-v2-x": (8, 16, 32),
    "osnet": (4, 8, 16, 16),
    "ha-cnn": (4, 8, 16),
    "robust-reid": (4, 8, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_and_embedding_have_their_shapes(name):
    strides = next((s for prefix, s in STRIDES.items() if name.startswith(prefix)), (4, 8, 16, 32))
    sizes = [(1, 1)] * 4 if name == "vit-b16" else [(256 // stride, 128 // stride) for stride in strides]
    with torch.device("meta"):
        net, images = find_model(name).build().eval(), torch.empty(2, 3, 256, 128)
    stages = net.backbone.stages(images)
    assert inspect.isgenerator(stages)
    shapes = [tuple(m.shape) for m in stages]
    assert shapes == [(2, c, *size) for c, size in zip(net.backbone.stage_channels, sizes, strict=True)]
    assert net.backbone.channels == shapes[-1][1] and net(images).shape == (2, net.dims)


@pytest.mark.parametrize("name", NETWORKS)
def test_who_stops_reading_the_stages_stops_the_computation(name):
    with torch.device("meta"):
        backbone, images = find_model(name).build().backbone.eval(), torch.empty(1, 3, 256, 128)
    ran: list[nn.Module] = []
    for module in backbone.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda module, _: ran.append(module))
    calls = [len(ran) for _ in backbone.stages(images)]
    work = [set(ran[begin:end]) for begin, end in zip([0, *calls], [*calls, len(ran)])]
    assert all(work[:-1]) and not work[-1]  # every stage runs modules of its own, and after the last none runs
    assert sum(map(len, work)) == len(set(ran))
    ran.clear()
    stages = backbone.stages(images)
    next(stages)
    stages.close()
    assert len(ran) == calls[0]


# ---------------------------------------------------------------------------------------- gradient
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_reaches_every_parameter(name):
    """Under all three losses. Batch norms are settled, since one that norms the batch itself takes the gradient from the
    biases (and from some scales) before it; in float64, where such a zero is below 1e-11 and any true gradient above 1e-6.
    """
    # a stripe's layer is only in use on a map with a row or a column for each stripe
    size = small_size(name) if name in BACKBONES else (128, 128)
    net = find_model(name, small(name)).build().double()
    if name.startswith("osnet"):  # all hidden units of a narrow gate may begin dead; from positive weights none does
        for gate in (module.gate for module in net.modules() if hasattr(module, "gate")):
            gate[1].weight.data.abs_()
    criterion = Criterion(net.branch_dims, 2, replace(RECIPES["drawn"], center_weight=5e-4)).double()
    images, labels = torch.randn(4, 3, *size, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    settle(net, images)
    criterion(net.branches(images), labels).total.backward()
    parameters = dict([*net.named_parameters(), *criterion.named_parameters()])
    frozen = {key for key, p in parameters.items() if not p.requires_grad}
    assert frozen <= {"head.neck.bias"}  # BNNeck's
    idle = {key for key, p in parameters.items() if key not in frozen and (p.grad is None or p.grad.abs().max() < 1e-9)}
    # the part-aware module's softmax is over the queries: a bias that all of them share cancels
    assert idle == {key for key in parameters if key.endswith(".query.bias")}


# ---------------------------------------------------------------------------------------- eval mode
@pytest.mark.parametrize("name", NETWORKS)
def test_eval_mode_is_deterministic_and_sees_every_image_alone(name):
    net, images = find_model(name, small(name)).build(), torch.randn(4, 3, *small_size(name))
    settle(net, images)
    before = {key: value.clone() for key, value in net.eval().state_dict().items()}
    with torch.no_grad():
        together = net(images)
        assert torch.equal(net(images), together)
        *_, last = net.backbone.stages(images)
        assert torch.equal(net.backbone(images), last)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        net, images = net.double(), images.double()  # float32 rounds to 1e-3 behind a batch norm of four images
        together = net(images)
        alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-8, atol=1e-8)
    assert together.std(dim=0).max() > 0.01  # the images are told apart


# ---------------------------------------------------------------------------------------- odd and small inputs
def refusal(name: str, height: int, width: int) -> str | None:
    """The words that refuse a size, for the models that do; all others take any."""
    smallest = min(height, width)
    if name in ("densenet201", "dare-d201") and smallest < 32:
        return "both sides must be 32 pixels or more: give a larger input size"
    if name.startswith("osnet") and smallest < 13:
        return "allowed: 13 or more a side"
    if name == "vit-b16" and (height % 16 or width % 16):
        return "both sides must be multiples of 16: the nearest size is"
    return None


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_and_small_inputs_work_or_are_refused_in_words(name):
    net = find_model(name, small(name)).build()
    for height, width in [(33, 17), (50, 30), (16, 16), (12, 29), (1, 1)]:
        images, words = torch.randn(2, 3, height, width), refusal(name, height, width)
        for training in (True, False):
            net.train(training).zero_grad()
            if words:
                with pytest.raises(UserError, match=f"{height} x {width}.*{words}"):
                    net(images)
                continue
            embedding = net(images)
            assert embedding.shape == (2, net.dims) and embedding.isfinite().all()
            embedding.square().sum().backward()
            assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


# ---------------------------------------------------------------------------------------- training
P, K, BATCHES, STEPS = 4, 4, 4, 20


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A few of the drawn people."""
    counts = drawn.Counts(train_identities=12, train_tracklets=24, train_images=72, test_identities=2, queries=2, gallery=4,
                          cameras=4, distractors=0, junk=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(drawn.SIZES, "tiny", replace(drawn.SIZES["tiny"], people=counts))
        root = drawn.ensure("people", "tiny", tmp_path_factory.mktemp("drawn"), workers=1, progress=False).parent
        return data.load("drawn-people-tiny", root, parts=("train",)).train


# their blocks are trained by a cheaper one of the family
SLOW = {"robust-reid-2x", "robust-reid-c", "densenet201"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW or name not in BODIES else []) for name in NETWORKS
])
def test_twenty_steps_of_training_lower_the_loss(name, samples):
    """On the same four batches, at the recipe's rate in its first epoch; without a step the loss would stay as it is."""
    recipe = replace(RECIPES["drawn"], input=small_size(name), identities=P, images=K)
    labels, identities = relabel(samples)
    augment = Augment(recipe.flip, recipe.pad, recipe.erase)
    loader = TrainLoader(samples, labels, recipe.input, PKSampler(labels, P, K), augment)
    batches = [batch for _, batch in zip(range(BATCHES), loader.epoch(0))]
    net = find_model(name, small(name)).build(recipe.drop_path).train()
    criterion = Criterion(net.branch_dims, identities, recipe)
    optimizer = make_optimizer(recipe, [p for p in (*net.parameters(), *criterion.parameters()) if p.requires_grad])
    set_rate(optimizer, recipe.learning_rate(0), recipe.momentum_of(0))
    losses = []
    for step in range(STEPS):
        images, wanted = batches[step % BATCHES]
        loss = criterion(net.branches(images), wanted).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # of vectors of length one (Robust-ReID's neck) the classifier, near zero at first, makes little in 20 steps
    limit = 0.97 if OWN_HEADS.get(name, {}).get("neck") == "l2" else 0.9
    assert sum(losses[-BATCHES:]) < limit * sum(losses[:BATCHES])


# ---------------------------------------------------------------------------------------- weights on disk
@pytest.mark.parametrize(("name", "options"), [
    *((name, {}) for name in NETWORKS),
    ("resnet18", {"head": "exits", "hidden": "8", "embedding_dim": "6", "pooling": "gem", "neck": "batch"}),
    ("ha-cnn", {"channels": "8,12,16", "stem": "4", "embedding_dim": "6", "pooling": "max"}),
    ("densenet201", {"head": "exits", "hidden": "8"}),
    ("robust-reid-1x", {"channels": "8,12", "repeats": "1,0", "shared_local": "false", "neck": "none"}),
    ("darts-v2", {"layers": "1,1", "stem": "half"}),
])
def test_weights_rebuild_the_network(name, options, tmp_path):
    spec = find_model(name, {**small(name), **options})
    net, path, images = spec.build(), tmp_path / "weights.safetensors", torch.randn(4, 3, *small_size(name))
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))  # nothing is as it was built
    settle(net, images)
    save_weights(path, net, spec, input=list(small_size(name)))
    again, header = load_weights(path)
    path.unlink()  # 343 MB of vit-b16, and pytest keeps the folders of three runs
    ours, theirs = net.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        embedding = net.eval()(images)
        assert torch.equal(again(images), embedding) and embedding.isfinite().all()
    assert again.input_size == small_size(name) and header["model"]["label"] == spec.label

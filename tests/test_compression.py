"""Shorter embeddings and int8 codes: against slow twins, and the paper's table as it stands."""

import copy
from dataclasses import replace

import joined
import planted
import pytest
import reference_compression as slow
import torch
from safetensors.torch import load_file
from test_heads import Maps, shaken
from torch import nn

from autoreid import cost, data
from autoreid.compression import (
    PCA,
    Int8,
    LowRank,
    ProductQuantiser,
    bytes_of,
    kmeans,
    largest_columns,
    ratio,
    reduction,
)
from autoreid.errors import UserError
from autoreid.heads import NECKS, ReIDNet
from autoreid.network import find_model, load_same, load_weights, save_weights
from autoreid.recipe import Recipe
from autoreid.runs import Run
from autoreid.train import Criterion, Learner, fit

HEADS = {"pooled": {}, "exits": {"hidden": 8, "embedding_dim": 6}, "streams": {"embedding_dim": 6}}
SMALL = Recipe(input=(32, 16), optimizer="sgd", lr=0.02, epochs=3, warmup_epochs=0, identities=4, images=3, pad=2, ema=0.9)
MODEL = {"width": 4, "stem": 3}


# ---------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize(("dims", "float_bytes", "float_ratio", "int8_bytes", "int8_ratio"), [
    (768, 3072, 1, 768, 4), (576, 2304, 1.33, 576, 5.33), (480, 1920, 1.6, 480, 6.4), (384, 1536, 2, 384, 8),
    (192, 768, 4, 192, 16), (64, 256, 12, 64, 48), (32, 128, 24, 32, 96),
])
def test_bytes_and_ratios_are_the_papers(dims, float_bytes, float_ratio, int8_bytes, int8_ratio):
    assert (bytes_of(dims), bytes_of(dims, "int8")) == (float_bytes, int8_bytes)
    assert round(ratio(768, dims), 2) == float_ratio and round(ratio(768, dims, "int8"), 2) == int8_ratio
    with pytest.raises(UserError, match="unknown dtype 'int4'; did you mean 'int8'"):
        bytes_of(dims, "int4")


@pytest.mark.parametrize(("k", "extra"), [
    (32, 49_152), (64, 98_304), (192, 294_912), (384, 589_824), (480, 737_280), (576, 884_736),
])
def test_low_rank_adds_the_papers_parameters_and_inference_has_half_of_them(k, extra):
    with torch.device("meta"):
        plain, short = (find_model("vit-b16", {"neck": "none", **options}).build() for options in ({}, {"rank": k}))
        criteria = [Criterion(net.branch_dims, 751, Recipe(), net.classified_dims) for net in (plain, short)]
    parameters = [sum(p.numel() for p in module.parameters()) for module in (plain, short, *criteria)]
    assert parameters[1] - parameters[0] == extra // 2 and parameters[3] - parameters[2] == extra // 2
    assert short.dims == k and short.classified_dims == (768,) and not [n for n in short.state_dict() if "expand" in n]


# ---------------------------------------------------------------------------------------- fewer dimensions
def test_slicing_is_low_rank_with_identity_factors():
    """The paper's footnote 2: the embedding to the bit, losses and the backbone's gradients to the order of sums."""
    images, labels = torch.randn(6, 3, 20, 12).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    for neck in ("none", "batch"):
        torch.manual_seed(1)
        sliced = ReIDNet(Maps(), neck=neck, slice=2).double().train()
        low = ReIDNet(Maps(), neck=neck, rank=2).double().train()
        low.load_state_dict(sliced.state_dict(), strict=False)
        recipe = replace(SMALL, center_weight=0.1)
        first = Criterion(sliced.branch_dims, 3, recipe, sliced.classified_dims).double()
        second = Criterion(low.branch_dims, 3, recipe, low.classified_dims).double()
        with torch.no_grad():
            low.head.reduce.weight.copy_(torch.eye(6)[:2])
            second.expand[0].weight.copy_(torch.eye(6)[:, :2])
            second.classifiers[0].weight[:, :2] = first.classifiers[0].weight
            second.centers[0].centers.copy_(first.centers[0].centers)
        ours, theirs = sliced.branches(images), low.branches(images)
        assert torch.equal(ours[0].metric, theirs[0].metric)
        torch.testing.assert_close(ours[0].classified, theirs[0].classified, rtol=1e-14, atol=1e-14)
        losses = first(ours, labels), second(theirs, labels)
        torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-14, atol=0)
        for loss in losses:
            loss.total.backward()
        for a, b in zip(sliced.backbone.convs[-1].parameters(), low.backbone.convs[-1].parameters(), strict=True):
            assert a.grad.abs().max() > 0  # the head reads the last map alone
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


def test_low_rank_is_the_slow_twin_and_its_second_factor_leads_to_the_classifier():
    net = shaken(ReIDNet(Maps(), rank=3))
    images = torch.randn(4, 3, 20, 12)
    features = net.head.pooling(net.maps(images))
    wanted = slow.product(features.tolist(), net.head.reduce.weight.T.tolist())
    torch.testing.assert_close(net.branches(images)[0].metric, torch.tensor(wanted))
    criterion = Criterion(net.branch_dims, 2, replace(SMALL, triplet_weight=0.0), net.classified_dims)
    read = []
    criterion.classifiers[0].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    criterion(net.branches(images), torch.tensor([0, 0, 1, 1]))
    wanted = slow.product(net(images).tolist(), criterion.expand[0].weight.T.tolist())
    torch.testing.assert_close(read[0], torch.tensor(wanted))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("option", "k"), [("slice", 4), ("rank", 2), ("keep", 6)])
@pytest.mark.parametrize("int8", [False, True])
def test_every_head_is_shortened(head, option, k, int8):
    net = ReIDNet(Maps(), head, **{**HEADS[head], option: k}, int8=int8).train()
    images, parts = torch.randn(4, 3, 20, 12), 2 if head == "streams" else 1
    branches = net.branches(images)
    assert net.dims == k and net(images).shape == (4, k) and set(net.branch_dims) == {k // parts}
    assert len(net.branch_dims) == len(branches) == {"pooled": 1, "exits": 4, "streams": 2}[head]
    assert all(b.metric.shape == b.classified.shape == (4, k // parts) for b in branches)
    assert set(net.classified_dims) == {6 if option == "rank" else k // parts}
    sum(b.metric.sum() + b.classified.square().sum() for b in branches).backward()
    assert all(conv.weight.grad is not None for conv in list(net.backbone.convs)[-1:])
    if head == "exits":
        net.eval()
        maps = list(net.backbone.stages(images))
        for walked, wanted in zip(net.head.walk(net.backbone.stages(images)), net.head.exits(maps), strict=True):
            assert torch.equal(walked, wanted) and walked.shape == (4, k)


@pytest.mark.parametrize("head", HEADS)
def test_without_compression_the_state_has_its_old_names(head):
    names = set(ReIDNet(Maps(), head, **HEADS[head]).head.state_dict())
    assert not [name for name in names if any(word in name for word in ("reduce", "stored", "stores"))]
    assert find_model("resnet18", MODEL).label == "resnet18-stem3-width4"
    assert find_model("resnet18", {"slice": 8}).label == "resnet18-slice8"
    assert set(find_model("resnet18", MODEL).head) == set()


@pytest.mark.parametrize(("head", "options", "words"), [
    ("pooled", {"slice": 2, "rank": 3}, "slice=2, rank=3: each is a way to shorten the embedding; give one of them"),
    ("pooled", {"slice": 7}, "slice=7: the embedding has 6 dimensions; allowed: 1 to 6"),
    ("pooled", {"rank": 0}, "rank=0: the embedding has 6 dimensions; allowed: 1 to 6"),
    ("exits", {"keep": 129}, "keep=129: the embedding has 128 dimensions; allowed: 1 to 128"),
    ("streams", {"slice": 9, "embedding_dim": 8},
     "slice=9: the embedding is 2 vectors side by side, each shortened alike; allowed: multiples of 2"),
    ("streams", {"rank": 18, "embedding_dim": 8}, "rank=18: the embedding has 16 dimensions; allowed: 1 to 16"),
])
def test_mistakes_are_named(head, options, words):
    with pytest.raises(UserError) as fault:
        ReIDNet(Maps(), head, **options)
    assert str(fault.value) == words


def test_a_reduction_that_is_not_asked_for_has_no_weights():
    module, dims = reduction(6, None, None, None)
    assert isinstance(module, nn.Identity) and dims == 6
    module, dims = reduction(6, None, 2, None)
    assert isinstance(module, LowRank) and dims == 2 and [p.shape for p in module.parameters()] == [(2, 6)]


# ---------------------------------------------------------------------------------------- int8
def test_codes_are_the_slow_twin():
    quantiser = Int8().eval()
    quantiser.largest.fill_(2.0)
    x = torch.cat([2.6 * torch.randn(40, 5), torch.tensor([[0.5, 1.5, -0.5, -2.5, 127.5]]) * quantiser.scale])
    codes, scale = quantiser.codes(x), float(quantiser.scale)
    assert codes.dtype is torch.int8 and codes.tolist() == [[slow.code(float(v), scale) for v in row] for row in x]
    assert codes.min() == -127 and codes.max() == 127
    assert torch.equal(quantiser(x), codes.float() * quantiser.scale) and scale == pytest.approx(2 / 127, rel=1e-7)


def test_the_gradient_goes_straight_through_and_the_values_are_codes():
    quantiser = Int8().eval()
    x = torch.tensor([[0.3, -0.7, 5.0]], requires_grad=True)  # the last is clipped
    y = quantiser(x)
    assert torch.equal(y, quantiser.codes(x).float() * quantiser.scale)
    (y * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert x.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_the_scale_follows_training_and_stands_in_evaluation():
    quantiser, batches = Int8(), [torch.randn(8, 3) * s for s in (1, 5, 0.5)]
    for batch in batches:
        quantiser(batch)
    assert float(quantiser.largest) == pytest.approx(slow.running_largest(batches), rel=1e-6)
    before = quantiser.largest.clone()
    quantiser(torch.full((2, 3), torch.inf))  # a step that mixed precision skips
    assert torch.equal(quantiser.largest, before)
    quantiser.eval()(100 * torch.randn(8, 3))
    assert torch.equal(quantiser.largest, before)
    late = Int8()
    late(torch.full((2, 3), torch.nan))  # is not the first
    late(batches[1])
    assert float(late.largest) == float(batches[1].abs().max()) and int(late.batches) == 1
    zero = Int8()
    assert torch.equal(zero(torch.zeros(2, 3)), torch.zeros(2, 3)) and zero.scale > 0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("neck", NECKS)
def test_embeddings_are_codes_times_one_scale(head, neck):
    net = ReIDNet(Maps(), head, neck=neck, **HEADS[head], int8=True).train()
    images = torch.randn(16, 3, 20, 12)
    for _ in range(3):
        branches = net.branches(images)
    quantisers = [m for m in net.modules() if isinstance(m, Int8)]
    assert {int(q.batches) for q in quantisers} == {3}
    between = neck not in ("none", "l2")  # then what the metric loss reads has a scale of its own
    assert len(quantisers) == (1 + between) * (4 if head == "exits" else 1)
    stores = net.head.stores if head == "exits" else [net.head.stored]
    metric = (stores[-1].metric or stores[-1].embedding).scale
    read = torch.cat([b.metric for b in branches[-len(branches) if head == "streams" else -1:]], dim=1) / metric
    if neck != "l2-test" and not between:
        assert all(b.metric is b.classified for b in branches)
    torch.testing.assert_close(read, read.round(), rtol=0, atol=2e-3)
    net.eval()
    codes = net.codes(images)
    assert codes.dtype is torch.int8 and codes.shape == (16, net.dims) and net.scale == float(net.int8.scale)
    assert torch.equal(net(images), codes.float() * net.int8.scale) and codes.abs().max() > 5
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype is torch.float32


def test_a_float_net_has_no_codes():
    net = ReIDNet(Maps())
    assert net.scale is None and net.int8 is None
    with pytest.raises(UserError, match="this net has float32 embeddings; train one with --set int8=true"):
        net.codes(torch.randn(1, 3, 20, 12))


def test_compressed_nets_are_counted_saved_and_loaded(tmp_path):
    spec = find_model("resnet18", {**MODEL, "rank": 8, "int8": "true"})
    plain = cost.measure(find_model("resnet18", {**MODEL, "embedding_dim": 32}).build, (32, 16))
    counted = cost.measure(spec.build, (32, 16))  # A, 8 x 32, and a shorter neck; no bias, no B
    without = cost.measure(find_model("resnet18", MODEL).build, (32, 16))
    assert counted.macs - without.macs == 8 * 32 and counted.params - without.params == 8 * 32 - (32 - 8)
    assert plain.macs - without.macs == 32 * 32
    net = spec.build().train()
    images = torch.randn(8, 3, 32, 16)
    net.branches(images)
    save_weights(tmp_path / "x.safetensors", net, spec, input=[32, 16])
    again, _ = load_weights(tmp_path / "x.safetensors")
    assert torch.equal(again(images), net.eval()(images)) and again.scale == net.scale != 1 / 127


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=8, test_identities=5)


def test_observers_and_the_second_factor_are_in_the_checkpoint_and_in_the_average(market, tmp_path, monkeypatch):
    """A low-rank int8 training with EMA that is stopped ends in the very state of one that is not."""
    samples = data.load("market", market, parts=("train",)).train

    def trained(folder, resume=False):
        torch.manual_seed(0)
        net = find_model("resnet18", {**MODEL, "rank": 8, "int8": True}).build()
        fit(net, samples, SMALL, Run(folder, {}, resume=resume, overwrite=False), seed=0)
        return net.state_dict()

    whole = trained(tmp_path / "whole")
    save = Run.save

    def stop_after(run, state):
        save(run, state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", stop_after)
        trained(tmp_path / "halves")
    again = trained(tmp_path / "halves", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    live = Run.saved(tmp_path / "whole")
    name = "head.stored.embedding.largest"
    assert live["criterion"]["expand.0.weight"].shape == (32, 8)
    assert whole[name] != live["net"][name] and whole["head.stored.embedding.batches"] == 18  # the average's


def test_both_factors_learn():
    recipe = replace(SMALL, ema=0.0)
    learner = Learner(find_model("resnet18", {**MODEL, "rank": 8, "int8": True}).build(), 2, recipe, 0, "cpu")
    before = [learner.net.head.reduce.weight.clone(), learner.criterion.expand[0].weight.clone()]
    for _ in range(2):  # the classifier begins near zero
        learner.step([(torch.randn(4, 3, 32, 16), torch.tensor([0, 0, 1, 1]))])
    after = [learner.net.head.reduce.weight, learner.criterion.expand[0].weight]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_processes_share_one_scale(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\nfrom autoreid import parallel\nfrom autoreid.compression import Int8\n"
        "parallel.start('cpu')\nq = Int8()\nfor k in (1.0, 3.0):\n    q(torch.tensor([[k * (1 + parallel.rank())]]))\n"
        "torch.save(q.largest, f'{sys.argv[1]}/{parallel.rank()}.pt')\n"
    )
    status, output = joined.run([str(script), str(tmp_path)])
    assert status == 0, output
    for rank in (0, 1):  # 2, then a tenth of the way to 6
        assert float(torch.load(tmp_path / f"{rank}.pt")) == pytest.approx(2.4)


# ---------------------------------------------------------------------------------------- pruning
def test_the_largest_columns_stay():
    features = torch.randn(30, 12)
    features[:, 7] = features[:, 2]
    for count in (1, 5, 11):
        assert largest_columns(features, count).tolist() == slow.kept_columns(features.tolist(), count)
    assert largest_columns(torch.ones(3, 5), 2).tolist() == [0, 1]


def test_after_a_batch_norm_all_columns_have_one_norm():
    """Why pruning looks before the neck."""
    net = ReIDNet(Maps()).train()
    b = net.branches(torch.randn(64, 3, 20, 12))[0]
    after, before = b.classified.norm(dim=0), b.metric.norm(dim=0)
    assert (after.max() / after.min()) < 1.01 < (before.max() / before.min())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("neck", ["none", "batch", "layer"])
def test_a_pruned_net_goes_on_with_the_same_weights_and_classifiers(head, neck):
    images, parts = torch.randn(8, 3, 20, 12), 2 if head == "streams" else 1
    recipe = replace(SMALL, center_weight=0.1)
    nets = [ReIDNet(Maps(), head, neck=neck, **HEADS[head], int8=True, **({"keep": k * parts} if k else {})).eval()
            for k in (None, 4, 2)]
    larger, criterion = nets[0], None
    shaken(larger)
    for smaller in nets[1:]:
        now = Criterion(larger.branch_dims, 3, recipe, larger.classified_dims)
        if criterion is not None:
            now.load_state_dict(criterion.state_dict())
        features = larger.before_necks(images)
        chosen = [largest_columns(f, k) for f, k in zip(features, smaller.branch_dims, strict=True)]
        smaller.take_pruned(larger, chosen)
        criterion = Criterion(smaller.branch_dims, 3, recipe, smaller.classified_dims)
        criterion.take_pruned(now.state_dict(), chosen)
        for i, (f, z, columns) in enumerate(zip(features, smaller.before_necks(images), chosen, strict=True)):
            assert torch.equal(z, f[:, columns])
            assert torch.equal(criterion.classifiers[i].weight, now.classifiers[i].weight[:, columns])
            assert torch.equal(criterion.centers[i].centers, now.centers[i].centers[:, columns])
        assert smaller.scale == larger.scale
        if neck == "batch" and head == "pooled":
            assert torch.equal(smaller(images), larger(images)[:, chosen[0]])
        larger = smaller


# ---------------------------------------------------------------------------------------- without training
def test_pca_keeps_the_distances_of_the_slow_twin():
    x = torch.randn(40, 6) @ torch.randn(6, 6) + 3
    for k in (1, 3, 6):
        pca = PCA.fit(x, k)
        found, wanted = pca(x).double(), torch.from_numpy(slow.principal(x, k))
        torch.testing.assert_close(torch.cdist(found, found), torch.cdist(wanted, wanted), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pca.axes.T @ pca.axes, torch.eye(k), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="PCA to 7 dimensions: 40 training embeddings of 6 span at most 6; give fewer"):
        PCA.fit(x, 7)
    with pytest.raises(UserError, match="span at most 3;"):
        PCA.fit(x[:4], 5)


def test_a_product_quantiser_names_the_nearest_centroids():
    train, x = torch.randn(400, 7), torch.randn(20, 7)
    coder = ProductQuantiser.fit(train, 3, rounds=4)
    assert coder.widths == [3, 2, 2] and coder.shared_bytes == 4 * 256 * 7
    codes = coder.codes(x)
    assert codes.dtype is torch.uint8 and codes.shape == (20, 3)
    assert codes.tolist() == [slow.nearest_centroids(row, [b.tolist() for b in coder.codebooks]) for row in x.tolist()]
    decoded = coder.decode(codes)
    assert torch.equal(decoded[4, :3], coder.codebooks[0][int(codes[4, 0])])
    assert all(torch.equal(a, b) for a, b in zip(coder.codebooks, ProductQuantiser.fit(train, 3, rounds=4).codebooks,
                                                 strict=True))
    few = ProductQuantiser.fit(train[:10], 2)  # a centroid each: nothing is lost
    torch.testing.assert_close(few.decode(few.codes(train[:10])), train[:10])
    with pytest.raises(UserError, match="product quantiser of 8 bytes: the embeddings have 7 dimensions; allowed: 1 to 7"):
        ProductQuantiser.fit(train, 8)


def test_kmeans_gets_nearer_and_fills_empty_centroids():
    points = torch.stack([torch.randn(2) + 10 * (i % 3) for i in range(150)])
    errors = [float(torch.cdist(points, kmeans(points, 3, rounds)).amin(1).square().mean()) for rounds in (0, 1, 5, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 3
    twice = torch.cat([torch.zeros(5, 2), torch.ones(5, 2)])  # all first centroids lie in one place
    assert sorted(kmeans(twice, 2, 5).tolist()) == [[0.0, 0.0], [1.0, 1.0]]


# ---------------------------------------------------------------------------------------- fine-tuning
def test_weights_of_another_net_are_refused(tmp_path):
    spec = find_model("resnet18", MODEL)
    net = spec.build()
    save_weights(tmp_path / "x.safetensors", net, spec, input=[32, 16])
    other = copy.deepcopy(net)
    nn.init.zeros_(other.backbone.stem[0].weight)
    load_same(other, tmp_path / "x.safetensors")
    assert all(torch.equal(v, load_file(tmp_path / "x.safetensors")[k]) for k, v in other.state_dict().items())
    with pytest.raises(UserError, match=r"--init .*: the weights of resnet18-stem3-width4, which is another network: \d+ "
                                        r"tensors differ, the first is backbone"):
        load_same(find_model("resnet18", {**MODEL, "width": 6}).build(), tmp_path / "x.safetensors")

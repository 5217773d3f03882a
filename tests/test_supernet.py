"""The supernet against its literal twin, GDAS' sampling, and the rule that derives a cell."""

import json

import pytest
import torch
from reference import derive_cell as derive_slowly
from reference import gdas_hard_weights, mixed_op, supernet_forward

from autoreid.errors import UserError
from autoreid.ops import Stripes
from autoreid.space import SearchSpace
from autoreid.supernet import MixedOp, Sampled, Supernet, derive_cell

REID = SearchSpace.load("reid")


def small(space=REID, dtype=torch.double) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(space, channels=4, layers=(1, 1), stem="half").to(dtype)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.normal_()
    return net


IMAGES = torch.randn(3, 3, 32, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------- DARTS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 6), (5, 3)])
def test_mixed_edge_equals_the_literal_sum(stride, size):
    edge = MixedOp(REID.operations, 6, stride, Stripes()).double()
    x = torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    weights = torch.softmax(torch.randn(7, dtype=torch.double), 0).requires_grad_()
    found = []
    for forward in (edge, lambda x, w: mixed_op(edge, x, w)):
        y = forward(x, weights)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, weights])])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_supernet_equals_the_literal_walk_and_so_do_the_alphas_gradients():
    net = small()
    found = []
    for forward in (lambda w: net(IMAGES, w), lambda w: supernet_forward(net, IMAGES, w)):
        y = forward(net.softmax_weights())
        found.append([y, *torch.autograd.grad(y.square().sum(), net.arch_parameters())])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_alphas_are_parameters_of_the_module_in_a_fixed_order():
    net = small()
    assert {"alphas.normal", "alphas.reduction"} <= set(net.state_dict())
    assert [p.shape for p in net.arch_parameters()] == [(14, 7), (14, 7)]
    assert net.arch_parameters()[0] is net.alphas["normal"]
    ids = {id(p) for p in net.weight_parameters()}
    assert not ids & {id(p) for p in net.arch_parameters()}
    assert len(ids) + 2 == len(list(net.parameters()))
    fresh = Supernet(REID, 4, (1, 1)).alphas["normal"]
    assert 0 < fresh.abs().max() < 0.01  # 1e-3 * N(0, 1)


def test_detached_weights_leave_the_alphas_without_gradient():
    net = small()
    for weights in (net.softmax_weights(detach=True), net.sample(5.0, torch.Generator(), detach=True)):
        net(IMAGES, weights).sum().backward()
        assert all(alpha.grad is None for alpha in net.arch_parameters())


# ---------------------------------------------------------------------------------------- GDAS
@pytest.mark.parametrize("gradient", ["sampled", "all"])
def test_gdas_forward_equals_running_every_operation_with_hard_weights(gradient):
    net = small()
    for seed in range(5):
        weights = net.sample(2.0, torch.Generator().manual_seed(seed), gradient)
        hard = gdas_hard_weights(net, 2.0, torch.Generator().manual_seed(seed))
        # batch norm sees the same inputs in both, so values agree to rounding
        torch.testing.assert_close(net(IMAGES, weights), supernet_forward(net, IMAGES, hard), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradient", ["sampled", "all"])
def test_gdas_gradient_through_the_drawn_entry(gradient):
    """One edge: out = hard[k] * o_k(x) gives alpha the softmax's row k; "all" adds the other rows' direct terms."""
    space = SearchSpace("two", ("none", "identity", "max_pool_3x3", "avg_pool_3x3"), nodes=1)
    net = Supernet(space, 4, (1, 1), "half").double()
    edge, alpha = net.cells[0].edges[0], net.alphas["normal"]
    x, probe = torch.randn(2, 2, 4, 6, 6, dtype=torch.double)
    for seed in range(8):
        choice = net.sample(0.7, torch.Generator().manual_seed(seed), gradient)["normal"][0]
        noise = torch.empty(2, 4, dtype=torch.double).exponential_(generator=torch.Generator().manual_seed(seed))
        soft = torch.softmax((torch.log_softmax(alpha[0], 0) - noise[0].log()) / 0.7, 0)
        k = choice.index
        objective = soft[k] * (probe * edge(x, Sampled(k, torch.ones(()), None))).sum()
        if gradient == "all":
            objective = objective + (soft.sum() - soft[k]) * probe.sum()
        (expected,) = torch.autograd.grad(objective, alpha)
        loss = (probe * edge(x, choice)).sum()
        if not loss.requires_grad:  # none was drawn, and "sampled" gives it no gradient
            assert k == 0 and gradient == "sampled" and expected.abs().max() == 0
            continue
        (got,) = torch.autograd.grad(loss, alpha)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    assert {net.sample(0.7, torch.Generator().manual_seed(s), gradient)["normal"][0].index for s in range(8)} >= {0, 2}


def test_gdas_runs_only_what_was_drawn_and_leaves_the_rest_without_gradient():
    net = small()
    weights = net.sample(1.0, torch.Generator().manual_seed(0))
    run = []
    for cell in net.cells:
        for k, edge in enumerate(cell.edges):
            for name, op in edge.operations.items():
                op.register_forward_hook(lambda *_, where=(cell.kind, k, name): run.append(where))
    net(IMAGES, weights).sum().backward()
    drawn = {(kind, k, REID.operations[c.index]) for kind, row in weights.items() for k, c in enumerate(row)}
    assert sorted(run) == sorted(where for where in drawn if where[2] != "none")
    for cell in net.cells:
        for k, edge in enumerate(cell.edges):
            for name, op in edge.operations.items():
                if (cell.kind, k, name) not in drawn:
                    assert all(p.grad is None for p in op.parameters())


def test_gdas_draws_one_operation_per_edge_and_kind_by_the_softmax():
    """The Gumbel-max trick draws an operation as often as its softmax says, at any temperature."""
    net = small()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(14, 7)
    rounds = 3000
    for _ in range(rounds):
        for edge, choice in enumerate(net.sample(0.3, generator, detach=True)["normal"]):
            counts[edge, choice.index] += 1
    expected = net.softmax_weights()["normal"].detach().float()
    assert ((counts / rounds - expected).abs() < 5 * (expected / rounds).sqrt() + 1e-3).all()


def test_a_node_whose_every_edge_draws_none_is_zero_and_has_the_right_size():
    net = small()
    none = REID.operations.index("none")
    weights = {kind: [Sampled(none, torch.ones(()), None)] * 14 for kind in net.alphas}
    assert net(IMAGES, weights).abs().max() == 0


def test_nan_in_a_map_does_not_pass_an_edge_that_drew_none():
    edge = small().cells[0].edges[0]
    y = edge(torch.full((1, 4, 4, 4), torch.nan, dtype=torch.double), Sampled(0, torch.ones(()), None))
    assert (y == 0).all()


# ---------------------------------------------------------------------------------------- derive
def test_derived_cells_equal_the_exhaustive_rule():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0):
        for _ in range(60):
            rows = torch.softmax(scale * torch.randn(14, 7, generator=generator, dtype=torch.double), 1).tolist()
            got = {frozenset(node) for node in derive_cell(REID, rows)}
            assert derive_cell(REID, rows) == derive_slowly(REID.operations, 4, rows), got


def test_an_edge_that_prefers_none_is_weak_but_may_be_kept():
    rows = [[1 / 7] * 7 for _ in range(14)]
    none = [0.94, *[0.01] * 6]
    rows[2] = none  # node 3, input 0
    node3 = derive_cell(REID, rows)[1]
    assert [source for _, source in node3] == [1, 2]
    rows[3] = rows[4] = none
    assert [source for _, source in derive_cell(REID, rows)[1]] == [0, 1]  # all alike: the lower inputs


def test_ties_go_to_the_lower_input_and_the_operation_named_first():
    rows = [[1 / 7] * 7 for _ in range(14)]
    assert derive_cell(REID, rows) == tuple((("part_aware", 0), ("part_aware", 1)) for _ in range(4))


def test_derive_gives_a_valid_genotype_and_the_path_it_would_keep():
    net = small()
    genotype = net.derive(seed=1)
    assert genotype.space == "reid" and json.loads(genotype.to_json())["provenance"] == {"seed": 1}
    weights = net.derived_weights()
    kept = [i for i, choice in enumerate(weights["normal"]) if choice.index >= 0]
    assert len(kept) == 8
    for node, pairs in enumerate(genotype.normal, start=2):
        for op, source in pairs:
            assert REID.operations[weights["normal"][REID.edges.index((node, source))].index] == op
    assert net(IMAGES, weights).shape == (3, net.dims)


def test_a_search_needs_a_reduction_cell():
    with pytest.raises(UserError, match="a search needs at least two stages"):
        Supernet(REID, 4, (2,))

"""The space as a value: its size counted by hand and by listing, its random and mutated genotypes."""

import itertools
import json

import pytest

from autoreid.errors import UserError
from autoreid.space import SearchSpace, known_spaces

TINY = SearchSpace("tiny", ("none", "identity", "sep_conv_3x3"), nodes=2)


def test_the_declared_spaces():
    assert known_spaces() == ["reid", "reid-vehicle", "standard"]
    reid, standard = SearchSpace.load("reid"), SearchSpace.load("standard")
    assert set(reid.operations) - set(standard.operations) == {"part_aware"}
    assert len(reid.operations) == 7 and len(reid.edges) == 14
    assert reid.size() == (1 * 3 * 6 * 10 * 6**8) ** 2


def test_size_equals_the_list_of_all_genotypes():
    ops = TINY.choices
    nodes2 = [((a, 0), (b, 1)) for a in ops for b in ops]
    nodes3 = [((a, i), (b, j)) for i, j in itertools.combinations(range(3), 2) for a in ops for b in ops]
    cells = list(itertools.product(nodes2, nodes3))
    assert TINY.size() == len(cells) ** 2
    one = {TINY.genotype(cell, cells[0]).key() for cell in cells}
    assert 1 < len(one) < len(cells)  # isomorphic cells share a key


def test_random_genotypes_cover_the_space_evenly():
    drawn = [SearchSpace.load("reid").random(seed) for seed in range(300)]
    assert len({g.key() for g in drawn}) > 290
    counts = dict.fromkeys(SearchSpace.load("reid").choices, 0)
    for g in drawn:
        for node in (*g.normal, *g.reduction):
            for op, _ in node:
                counts[op] += 1
    mean = 300 * 16 / 6
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())
    assert SearchSpace.load("reid").random(5) == SearchSpace.load("reid").random(5)


def test_a_mutation_changes_exactly_one_thing():
    space = SearchSpace.load("reid")
    parent = space.random(0)
    for seed in range(200):
        child = space.mutate(parent, seed)
        changed = [
            (before, after)
            for one, other in ((parent.normal, child.normal), (parent.reduction, child.reduction))
            for node_before, node_after in zip(one, other, strict=True)
            for before, after in zip(node_before, node_after, strict=True)
            if before != after
        ]
        assert len(changed) == 1
        (op, source), (new_op, new_source) = changed[0]
        assert (op == new_op) != (source == new_source)


@pytest.mark.parametrize(("data", "words"), [
    ({"name": "x", "operations": ["identity", "none"]},
     "search space x: only ['identity'] besides none; nothing to search: list at least two operations"),
    ({"name": "x", "operations": ["identity", "sep_conv_3x3"], "nodes": 0},
     "search space x: nodes is 0; allowed: 1 to 8"),
    ({"name": "x", "operations": ["identity", "identity", "sep_conv_3x3"]},
     "search space x: an operation is listed twice in ['identity', 'identity', 'sep_conv_3x3']"),
    ({"name": "x", "operations": ["identity", "conv"]},
     "unknown operation in search space x 'conv'; known: avg_pool_3x3, dil_conv_3x3, dil_conv_5x5, identity, "
     "max_pool_3x3, none, part_aware, sep_conv_3x3, sep_conv_5x5"),
    (5, "search space: must be a JSON object, got 5"),
    ({"name": "x", "operations": 5}, "search space: operations must be a list of names, got 5"),
    ({"name": "a/b", "operations": ["identity", "sep_conv_3x3"]},
     "search space: name is 'a/b'; allowed: letters, digits, '.', '_' and '-'"),
    ({"name": "x", "operations": ["identity", "sep_conv_3x3"], "depth": 3},
     "unknown search space entry 'depth'; known: axis, name, nodes, operations, parts, source"),
])
def test_faults_are_named(tmp_path, data, words):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as fault:
        SearchSpace.load(str(path))
    assert str(fault.value) == f"{path}: {words}"


def test_unknown_space():
    with pytest.raises(UserError, match="unknown search space 'ried'; did you mean 'reid'"):
        SearchSpace.load("ried")

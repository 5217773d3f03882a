"""The genotype as a value: file format, faults by name, keys equal for isomorphic cells."""

import itertools
import json
import subprocess
import sys

import pytest

from autoreid.errors import UserError
from autoreid.genotype import Genotype
from autoreid.space import published

SEP, ID, MAX = "sep_conv_3x3", "identity", "max_pool_3x3"
CELL = (((SEP, 0), (ID, 1)), ((MAX, 2), (SEP, 0)), ((SEP, 0), (SEP, 1)), ((ID, 2), (MAX, 3)))


def genotype(normal=CELL, reduction=CELL, **options) -> Genotype:
    return Genotype("reid", normal, reduction, options.pop("concat", (2, 3, 4, 5)), **options)


def as_json(**changes) -> dict:
    return {**json.loads(genotype().to_json()), **changes}


def test_file_round_trip(tmp_path):
    one = genotype(parts=6, axis="width", provenance={"seed": 3})
    path = tmp_path / "genotype.json"
    path.write_text(one.to_json())
    again = Genotype.load(path)
    assert again == one and again.provenance == {"seed": 3}
    assert json.loads(one.to_json()) == one.to_dict()


def test_the_contracts_example_has_its_form():
    data = as_json()
    assert list(data) == ["format", "version", "space", "normal", "reduction", "concat", "provenance"]
    assert data["normal"][0] == [[SEP, 0], [ID, 1]]


def nodes_of_json(*nodes):
    return [list(map(list, node)) for node in nodes]


BAD = [
    ({"normal": nodes_of_json(((SEP, 0), (ID, 0)), *CELL[1:])},
     "genotype: normal node 2 reads input 0 twice; its two inputs must be distinct"),
    ({"reduction": nodes_of_json(CELL[0], (("sep_conv3x3", 0), (ID, 1)), *CELL[2:])},
     "unknown operation in reduction node 3 'sep_conv3x3'; did you mean 'sep_conv_3x3'? known: avg_pool_3x3, "
     "dil_conv_3x3, dil_conv_5x5, identity, max_pool_3x3, part_aware, sep_conv_3x3, sep_conv_5x5"),
    ({"normal": nodes_of_json(*CELL[:3])},
     "genotype: normal has 3 nodes and reduction 4: both cells must have the same number"),
    ({"normal": nodes_of_json(((SEP, 0), (ID, 2)), *CELL[1:])},
     "genotype: normal node 2 reads input 2; allowed: 0 to 1 (a node reads earlier states only)"),
    ({"normal": [[[SEP, 0]], *nodes_of_json(*CELL[1:])]},
     "genotype: normal node 2 must be two [operation, input] pairs, got [['sep_conv_3x3', 0]]"),
    ({"concat": [2, 7]},
     "genotype: concat is [2, 7]; allowed: distinct node numbers from 2 to 5, in rising order"),
    ({"version": 2}, "genotype: version 2 is not known, this autoreid reads 1"),
    ({"format": "other"}, "not a genotype: format is 'other', expected 'autoreid-genotype'"),
    ({"extra": 1},
     "unknown genotype entry 'extra'; known: axis, concat, format, normal, parts, provenance, reduction, space, version"),
    ({"concat": 5}, "genotype: concat must be a list of node numbers, got 5"),
    ({"concat": ["a", 2]}, "genotype: concat must be a list of node numbers, got ['a', 2]"),
    ({"provenance": [1]}, "genotype: provenance must be an object, got [1]"),
    ({"axis": "depth"}, "unknown axis 'depth'; did you mean 'width'? known: height, width"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_faults_are_named(tmp_path, change, words):
    path = tmp_path / "g.json"
    path.write_text(json.dumps(as_json(**change)))
    with pytest.raises(UserError) as fault:
        Genotype.load(path)
    assert str(fault.value) == f"{path}: {words}"


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="none.json: no such genotype file"):
        Genotype.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": "autoreid-gen')
    with pytest.raises(UserError, match="half.json: not valid JSON"):
        Genotype.load(tmp_path / "half.json")
    (tmp_path / "latin.json").write_bytes(b'{"space": "\xe9"}')
    with pytest.raises(UserError, match="latin.json: not valid JSON"):
        Genotype.load(tmp_path / "latin.json")


def test_none_is_no_operation_of_a_genotype():
    with pytest.raises(UserError, match="unknown operation in normal node 2 'none'"):
        genotype(normal=((("none", 0), (ID, 1)), *CELL[1:]))


# ---------------------------------------------------------------------------------------- keys
def renumbered(cell, order):
    """The same cell with node order[i] called i + 2; None when a node would read a later one."""
    place = {0: 0, 1: 1, **{node: i for i, node in enumerate(order, start=2)}}
    nodes = [tuple((op, place[source]) for op, source in cell[node - 2]) for node in order]
    fits = all(source < number for number, node in enumerate(nodes, start=2) for _, source in node)
    return tuple(nodes) if fits else None


def test_key_is_equal_for_every_renumbering_and_order_of_pairs():
    key, seen = genotype().key(), 0
    for order in itertools.permutations(range(2, 6)):
        cell = renumbered(CELL, order)
        if cell is not None:
            seen += 1
            assert genotype(cell, tuple((b, a) for a, b in cell)).key() == key
    assert seen > 1


def test_key_tells_apart_what_differs():
    other_op = (((SEP, 0), (MAX, 1)), *CELL[1:])
    other_input = (*CELL[:3], ((ID, 2), (MAX, 4)))
    swapped_inputs = tuple(tuple((op, {0: 1, 1: 0}.get(s, s)) for op, s in node) for node in CELL)
    keys = {genotype(c).key() for c in (CELL, other_op, other_input, swapped_inputs)}
    assert len(keys) == 4
    assert genotype().key() != genotype(CELL, other_op).key() != genotype(other_op, CELL).key()


def test_key_sees_sharing():
    """Two nodes alike: reading one of them twice through others is another cell than reading both."""
    twin = ((SEP, 0), (SEP, 1))
    share = (twin, twin, ((ID, 0), (SEP, 2)), ((ID, 0), (SEP, 2)))
    apart = (twin, twin, ((ID, 0), (SEP, 2)), ((ID, 0), (SEP, 3)))
    assert genotype(share, share).key() != genotype(apart, apart).key()


def test_key_ignores_a_node_that_nothing_reads():
    dead = (CELL[0], ((MAX, 0), (MAX, 1)), CELL[2], ((ID, 2), (MAX, 4)))
    other = (CELL[0], ((SEP, 0), (ID, 1)), CELL[2], ((ID, 2), (MAX, 4)))
    assert genotype(dead, dead, concat=(4, 5)).key() == genotype(other, other, concat=(4, 5)).key()
    assert genotype(dead, dead).key() != genotype(other, other).key()


def test_key_has_the_stripes_only_where_a_part_aware_operation_cuts_them():
    part = ((("part_aware", 0), (ID, 1)), *CELL[1:])
    assert genotype(parts=2).key() == genotype().key()
    assert genotype(part, parts=2).key() != genotype(part).key()


def test_published_genotypes_load_and_differ():
    names = ["autoreid-baseline", "autoreid-baseline-reid", "autoreid-retrieval-reid", "darts-v2", "gdas-v1"]
    assert sorted(published()) == names
    assert len({Genotype.load(path).key() for path in published().values()}) == 5


def test_no_torch_is_needed():
    code = "import sys, autoreid.genotype, autoreid.space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

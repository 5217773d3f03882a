"""Ranked lists: the worst queries first, each answer marked, against the ranking written out."""

import numpy as np
import pytest
from PIL import Image

from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.metrics import metrics_from_distances
from autoreid.plots import FRAMES, save
from autoreid.plots import ranked_lists as draw
from autoreid.ranked import ranked_lists
from autoreid.rerank import rerank

# one dimension: the distances are read off. Query 0 is person 1 seen by camera 1.
QUERY = np.array([[0.0], [10.0], [50.0]])
GALLERY = np.array([[0.5], [1.0], [2.0], [3.0], [10.5], [11.0]])
IDENTITIES, CAMERAS = [1, 2, 1, -1, 3, 2], [1, 2, 2, 2, 2, 1]
SIDES = (QUERY, [1, 2, 9], [1, 1, 1], GALLERY, IDENTITIES, CAMERAS)


def test_a_list_marks_matches_others_and_junk():
    [ranked] = ranked_lists(*SIDES, queries=[0], depth=5)
    assert ranked.gallery == (0, 1, 2, 3, 4) and ranked.distances == pytest.approx((0.5, 1, 2, 3, 10.5))
    # its own camera's image and nobody's are junk; person 1's from camera 2 is second behind person 2's
    assert ranked.kinds == ("junk", "wrong", "match", "junk", "wrong") and ranked.average_precision == 0.5


def test_the_worst_come_first_and_a_query_without_a_match_has_no_precision():
    lists = ranked_lists(*SIDES, count=5)
    # query 1's own camera took the last image, so its match is the one at distance 9, behind 10.5 and 2.0
    assert [(r.query, r.average_precision) for r in lists] == [(1, pytest.approx(1 / 3)), (0, 0.5)]
    [unscored] = ranked_lists(*SIDES, queries=[2])
    assert unscored.average_precision is None and len(unscored.gallery) == 6 and "match" not in unscored.kinds


def test_reranked_lists_are_those_of_the_reranked_distances():
    rng = np.random.default_rng(0)
    identities = rng.integers(-1, 6, 70)
    features = rng.normal(size=(7, 6))[identities] + rng.normal(size=(70, 6))
    cameras = rng.integers(1, 4, 70)
    sides = [part for n in (slice(0, 30), slice(30, 70)) for part in (features[n], identities[n], cameras[n])]
    distances = rerank(sides[0], sides[3], 5, 2, 0.3)
    lists = ranked_lists(*sides, count=30, depth=12, rerank=(5, 2, 0.3))
    metrics = metrics_from_distances(distances, *sides[1:3], *sides[4:])
    assert len(lists) == metrics.scored > 15
    assert np.mean([found.average_precision for found in lists]) == pytest.approx(metrics.mAP, abs=1e-12)
    assert [r.average_precision for r in lists] == sorted(r.average_precision for r in lists)
    for found in lists:
        order = np.argsort(distances[found.query], kind="stable")[:12]
        assert found.gallery == tuple(order) and found.distances == pytest.approx(distances[found.query][order])
        junk = (sides[4] == -1) | ((sides[4] == sides[1][found.query]) & (sides[5] == sides[2][found.query]))
        assert [kind == "junk" for kind in found.kinds] == junk[order].tolist()
    chosen = [found.query for found in lists[3:6]]
    assert ranked_lists(*sides, queries=chosen, depth=12, rerank=(5, 2, 0.3)) == lists[3:6]
    assert [found.gallery for found in ranked_lists(*sides, queries=chosen, depth=12)] != [f.gallery for f in lists[3:6]]


def test_equal_distances_stand_in_gallery_order():
    equal = np.zeros((9, 1))
    [ranked] = ranked_lists(np.zeros((1, 1)), [1], [1], equal, [1] * 9, [2] * 9, depth=4)
    assert ranked.gallery == (0, 1, 2, 3)


def test_a_querys_own_picture_is_junk_where_cameras_do_not_say_so():
    own = [10, 11, 12], [20, 10, 22, 23, 24, 25]
    [ranked] = ranked_lists(*SIDES, protocol="plain", queries=[0], pictures=own)
    assert ranked.kinds[:3] == ("match", "wrong", "match") and ranked.average_precision == pytest.approx((1 + 2 / 3) / 2)
    own = [10, 11, 12], [10, 21, 22, 23, 24, 25]
    [ranked] = ranked_lists(*SIDES, protocol="plain", queries=[0], pictures=own)
    assert ranked.kinds[:3] == ("junk", "wrong", "match") and ranked.average_precision == 0.5


@pytest.mark.parametrize(("options", "words"), [
    ({"protocol": "vehicleid/test-800"}, "protocol 'vehicleid/test-800' draws its gallery, so a query has no one list"),
    ({"queries": [3]}, "there is no query 3; allowed is 0 to 2"),
    ({"count": 0}, "ranked lists: count=0, depth=10; allowed is 1 or more each"),
])
def test_mistakes_are_named(options, words):
    with pytest.raises(UserError) as fault:
        ranked_lists(*SIDES, **options)
    assert str(fault.value).startswith(words)


def test_the_picture_frames_every_answer_in_its_colour(tmp_path):
    paths = []
    for i in range(9):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 16), (20 * i, 0, 0)).save(paths[-1])
    query = [Sample(paths[i], identity, 1) for i, identity in enumerate([1, 2, 9])]
    gallery = [Sample(path, i, c) for path, i, c in zip(paths[3:], IDENTITIES, CAMERAS, strict=True)]
    figure = draw(ranked_lists(*SIDES, queries=[0], depth=5), query, gallery, "title")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6 and shown[0].get_title() == "1\nAP 50 %"
    assert shown[0].get_ylabel() == f"{tmp_path.name}/0.png"  # what --queries takes
    assert [axes.get_title().split("\n")[0] for axes in shown[1:]] == ["junk", "1", "2", "junk", "3"]
    colours = [axes.spines["left"].get_edgecolor() for axes in shown[1:]]
    from matplotlib.colors import to_rgba

    assert colours == [to_rgba(FRAMES[kind]) for kind in ("junk", "wrong", "match", "junk", "wrong")]
    named = draw(ranked_lists(*SIDES, queries=[0]), query, gallery, "title", {1: "anna"}.get)
    assert named.axes[0].get_title() == "anna\nAP 50 %"
    save(figure, tmp_path / "lists.png")
    assert (tmp_path / "lists.png").stat().st_size > 2000

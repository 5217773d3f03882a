"""Ranked lists: the worst queries first, each answer marked, against the ranking written out."""

import numpy as np
import pytest
from PIL import Image

from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.plots import FRAMES, save
from autoreid.plots import ranked_lists as draw
from autoreid.ranked import ranked_lists

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
    assert len(shown) == 6 and shown[0].get_title() == "query 0\nAP 50 %"
    assert [axes.get_title().split("\n")[0] for axes in shown[1:]] == ["junk", "1", "2", "junk", "3"]
    colours = [axes.spines["left"].get_edgecolor() for axes in shown[1:]]
    from matplotlib.colors import to_rgba

    assert colours == [to_rgba(FRAMES[kind]) for kind in ("junk", "wrong", "match", "junk", "wrong")]
    save(figure, tmp_path / "lists.png")
    assert (tmp_path / "lists.png").stat().st_size > 2000

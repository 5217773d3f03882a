"""Slow, obvious twins of the metrics: explicit loops, one line per sentence of the definition. Nothing of autoreid."""

import math
import statistics

import numpy as np

CMC = (1, 5, 10, 20)


def distance(a, b, metric="euclidean"):
    """The squared distance of two vectors, or of their directions."""
    a, b = [float(x) for x in a], [float(x) for x in b]
    if metric == "cosine":
        length_a, length_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        if not length_a or not length_b:
            return 2.0  # no direction: a cosine of 0
        a, b = [x / length_a for x in a], [x / length_b for x in b]
    return sum((x - y) * (x - y) for x, y in zip(a, b, strict=True))


def ranked_matches(distances, query_ids, query_cams, gallery_ids, gallery_cams, drop=(-1,), same_camera_is_junk=True):
    """Per query the list of True (a match) and False down its ranking, junk left out; ties by gallery order."""
    rankings = []
    for q, row in enumerate(distances):
        ranking = []
        for g in sorted(range(len(row)), key=lambda g: (row[g], g)):
            if gallery_ids[g] in drop:
                continue
            if same_camera_is_junk and gallery_ids[g] == query_ids[q] and gallery_cams[g] == query_cams[q]:
                continue
            ranking.append(gallery_ids[g] == query_ids[q] and query_ids[q] not in drop)
        rankings.append(ranking)
    return rankings


def ranks_of_matches(rankings):
    """Per query with a match, the 1-based places of its matches."""
    return [[place for place, match in enumerate(r, start=1) if match] for r in rankings if any(r)]


def figures(rankings, denominator="scored"):
    """mAP, mAP_trapezoid, mINP, cmc, total and scored from the rankings; None where no query has a match."""
    step, trapezoid, inp, cmc = [], [], [], {k: [] for k in CMC}
    for ranking in rankings:
        matches = sum(ranking)
        if matches == 0:
            continue
        hits, ap, area, old_recall, old_precision, last = 0, 0.0, 0.0, 0.0, 1.0, 0
        for place, match in enumerate(ranking, start=1):
            if match:
                hits, last = hits + 1, place
                ap += hits / place / matches
            # The official compute_AP.m, which walks down every place and adds a trapezoid.
            recall, precision = hits / matches, hits / place
            area += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
        step.append(ap)
        trapezoid.append(area)
        inp.append(matches / last)
        for k in CMC:
            cmc[k].append(any(ranking[:k]))
    if not step:
        return None
    divided_by = {"scored": len(step), "all": len(rankings)}[denominator]
    return {
        "mAP": sum(step) / divided_by,
        "mAP_trapezoid": sum(trapezoid) / divided_by,
        "mINP": sum(inp) / divided_by,
        "cmc": {str(k): sum(found) / divided_by for k, found in cmc.items()},
        "total": len(rankings),
        "scored": len(step),
    }


def drawn_order(count, draw):
    """The gallery's images in the order of the draw."""
    numbers = [int(number) for number in np.random.PCG64(draw).random_raw(count)]
    return sorted(range(count), key=lambda g: numbers[g])


def vehicleid_draw(distances, ids, draw):
    """One image of each identity answers, every other image asks: its ranking."""
    drawn = {}
    for g in drawn_order(len(ids), draw):
        drawn.setdefault(ids[g], g)
    gallery = sorted(drawn.values())
    asking = [q for q in range(len(ids)) if q not in gallery]
    return [[ids[g] == ids[q] for g in sorted(gallery, key=lambda g: (distances[q][g], g))] for q in asking]


def single_shot_draw(distances, query_ids, query_cams, gallery_ids, gallery_cams, draw, drop=(-1,)):
    """Each query ranks one image per identity, from another camera than its own where there is one."""
    order, rankings = drawn_order(len(gallery_ids), draw), []
    for q in range(len(query_ids)):
        drawn = {}
        for g in [g for g in order if gallery_cams[g] != query_cams[q]] + order:
            if gallery_ids[g] not in drop:
                drawn.setdefault(gallery_ids[g], g)
        ranking = []
        for g in sorted(drawn.values(), key=lambda g: (distances[q][g], g)):
            if gallery_ids[g] == query_ids[q] and gallery_cams[g] == query_cams[q]:
                continue
            ranking.append(gallery_ids[g] == query_ids[q] and query_ids[q] not in drop)
        rankings.append(ranking)
    return rankings


def over_draws(draws):
    """Means, and sample deviations, of the figures of several draws."""
    names = ("mAP", "mAP_trapezoid", "mINP")
    mean = {n: statistics.fmean(d[n] for d in draws) for n in names}
    std = {n: statistics.stdev(d[n] for d in draws) for n in names}
    mean["cmc"] = {k: statistics.fmean(d["cmc"][k] for d in draws) for k in draws[0]["cmc"]}
    std["cmc"] = {k: statistics.stdev(d["cmc"][k] for d in draws) for k in draws[0]["cmc"]}
    return {**mean, "total": draws[0]["total"], "scored": draws[0]["scored"], "repeats": len(draws), "std": std}

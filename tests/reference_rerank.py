"""Slow, obvious twins of re-ranking and query expansion: dense lists of numbers, one line per sentence of the paper."""

import math


def _unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector] if length else list(vector)


def _ranking(distances):
    """Indices from the nearest on; distances equal to 12 digits are in order of index."""
    return sorted(range(len(distances)), key=lambda j: (round(distances[j], 12), j))


def _more_than_two_thirds(shared, size):
    return 3 * shared > 2 * size


def rerank(query, gallery, k1, k2, lam, metric="euclidean", enough=_more_than_two_thirds, half=None):
    """Zhong et al. 2017 by the authors' code: the N x M final distances."""
    half = round(k1 / 2) if half is None else half
    images = [list(map(float, x)) for x in [*query, *gallery]]
    if metric == "cosine":
        images = [_unit(x) for x in images]
    everybody = range(len(images))
    d = [[sum((a - b) ** 2 for a, b in zip(images[i], images[j])) for j in everybody] for i in everybody]
    d = [[x / max(row) if max(row) > 0 else 0.0 for x in row] for row in d]
    ranking = [_ranking(row) for row in d]

    def nearest(p, k):
        return ranking[p][: k + 1]

    def reciprocal(p, k):
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    features = []
    for p in everybody:
        expanded = set(reciprocal(p, k1))
        for q in reciprocal(p, k1):
            smaller = reciprocal(q, half)
            if enough(len(reciprocal(p, k1) & smaller), len(smaller)):
                expanded |= smaller
        total = sum(math.exp(-d[p][g]) for g in expanded)
        features.append([math.exp(-d[p][g]) / total if g in expanded else 0.0 for g in everybody])

    if k2 != 1:
        near = [ranking[p][:k2] for p in everybody]
        features = [[sum(features[q][g] for q in near[p]) / len(near[p]) for g in everybody] for p in everybody]

    final = []
    for p in range(len(query)):
        row = []
        for g in range(len(query), len(images)):
            smaller = sum(min(a, b) for a, b in zip(features[p], features[g]))
            jaccard = 1 - smaller / (2 - smaller)
            row.append((1 - lam) * jaccard + lam * d[p][g])
        final.append(row)
    return final


def expand_queries(query, gallery, k, alpha):
    """Chum et al. 2007 (alpha = 0) and Radenovic et al. 2018: the N new queries."""
    gallery = [_unit(list(map(float, x))) for x in gallery]
    expanded = []
    for q in query:
        q = _unit(list(map(float, q)))
        distances = [sum((a - b) ** 2 for a, b in zip(q, g)) for g in gallery]
        largest = max(distances) or 1.0
        total = list(q)
        for j in _ranking([x / largest for x in distances])[:k]:
            weight = max(sum(a * b for a, b in zip(q, gallery[j])), 0.0) ** alpha
            total = [t + weight * x for t, x in zip(total, gallery[j])]
        expanded.append(_unit(total))
    return expanded

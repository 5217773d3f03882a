"""Slow, obvious twins of autoreid.neighbours and of the threshold in autoreid.index: Python's own numbers, one pair after
another, everything sorted."""

from fractions import Fraction
from itertools import combinations


def nearest(query, gallery, k):
    """(squared distance, place) of the k nearest of each query: exact fractions, so that ties are ties."""
    return [sorted((squared(q, g), place) for place, g in enumerate(gallery))[:k] for q in query]


def squared(a, b):
    return sum((Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(a, b, strict=True))


def squared_of_codes(query, gallery):
    """Q x N Python integers."""
    return [[sum((int(x) - int(y)) ** 2 for x, y in zip(q, g, strict=True)) for g in gallery] for q in query]


def pairs(features, identities, cameras):
    """Distances of the genuine and of the impostor pairs, of two cameras where there are several."""
    across = len(set(cameras)) > 1
    genuine, impostors = [], []
    for i, j in combinations(range(len(features)), 2):
        if not across or cameras[i] != cameras[j]:
            distance = float(squared(features[i], features[j])) ** 0.5
            (genuine if identities[i] == identities[j] else impostors).append(distance)
    return genuine, impostors


def threshold(impostors, rate):
    """The largest impostor distance that lets no more than the share ``rate`` of them match."""
    good = [d for d in impostors if sum(other <= d for other in impostors) <= rate * len(impostors)]
    return max(good, default=None)

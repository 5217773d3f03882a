"""Budgets and streams, slow and obvious: one query, one exit and one gallery image at a time. Nothing of autoreid."""

import math

GOLDEN = (1 + math.sqrt(5)) / 2 - 1


def shares(a, exits):
    """p_s = a^(s-1) / Z."""
    weights = [a**s for s in range(exits)]
    return [w / sum(weights) for w in weights]


def mean_cost(p, costs):
    return sum(share * cost for share, cost in zip(p, costs, strict=True))


def ratio(costs, budget):
    """The a whose shares cost the budget, by bisection of its logarithm."""
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        if mean_cost(shares(math.exp(middle), len(costs)), costs) < budget:
            low = middle
        else:
            high = middle
    return math.exp(low)


def conditional(p):
    """q_s = p_s / (1 - sum of the p before)."""
    return [share / (1 - sum(p[:s])) for s, share in enumerate(p)]


def confidence(kind, query, gallery, left_out, identities):
    """Of one query at one exit; ``left_out`` says of each gallery image whether it is not compared with."""
    distances = [math.inf if out else math.dist(query, other) for other, out in zip(gallery, left_out, strict=True)]
    nearest = min(distances)
    if kind == "distance" or math.isinf(nearest):
        return -nearest
    who = identities[distances.index(nearest)]
    others = [d for d, identity in zip(distances, identities, strict=True) if identity != who]
    return min(others, default=math.inf) - nearest


def leaves(confidence, before, q):
    """Whether a query leaves whose exit these confidences reached before, in this order."""
    everyone = [(c, n * GOLDEN % 1) for n, c in enumerate([*before, confidence], 1)]
    surer = sum(one > everyone[-1] for one in everyone[:-1])
    return surer + 1 - 0.5 <= q * len(everyone)


def stream(confidences, q):
    """The exit of each query, in this order; a row of confidences each."""
    reached, exits = [[] for _ in q], []
    for row in confidences:
        for s, c in enumerate(row):
            goes = s + 1 == len(q) or leaves(c, reached[s], q[s])
            reached[s].append(c)
            if goes:
                exits.append(s + 1)
                break
    return exits

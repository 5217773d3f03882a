"""Slow, obvious twins of what ``autoreid.tune`` computes: one trial, one model, one comparison at a time."""


def normalised_rank(mAP: float, references: list[float]) -> float:
    """By the knots: each distinct reference between 0 and 1 at the mean place of its equals, (0, 0) and (1, 1)."""
    places = {}
    for place, value in enumerate(sorted(references), start=1):
        places.setdefault(value, []).append(place / (len(references) + 1))
    knots = {0.0: 0.0, 1.0: 1.0}
    for value, equal in places.items():
        if value not in knots:
            knots[value] = sum(equal) / len(equal)
    if mAP in knots:
        return knots[mAP]
    below = max(x for x in knots if x < mAP)
    above = min(x for x in knots if x > mAP)
    share = (mAP - below) / (above - below)
    return knots[below] + share * (knots[above] - knots[below])


def mean_ranks(mAPs: list[dict[str, float]]) -> list[float]:
    """One more than the better trials, and half a place for each other trial that is equal."""
    ranks = []
    for one in mAPs:
        of_models = []
        for model in one:
            others = [other[model] for other in mAPs if other is not one]
            better = sum(value > one[model] for value in others)
            equal = sum(value == one[model] for value in others)
            of_models.append(1 + better + equal / 2)
        ranks.append(sum(of_models) / len(of_models))
    return ranks

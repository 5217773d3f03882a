"""Compression, slow and obvious: one value, one column, one centroid at a time."""

import math

import numpy as np


def code(value: float, scale: float) -> int:
    """The whole number nearest to value / scale, halves to the even one, from -127 to 127."""
    exact = float(np.float32(value) / np.float32(scale))
    low = math.floor(exact)
    part = exact - low
    nearest = low + 1 if part > 0.5 or (part == 0.5 and low % 2) else low
    return max(-127, min(127, nearest))


def running_largest(batches, share=0.1):
    """The observer: the first batch's largest absolute value, then nearer to each new one by a tenth."""
    largest = None
    for batch in batches:
        now = max(abs(float(v)) for row in batch for v in row)
        largest = now if largest is None else largest + share * (now - largest)
    return largest


def product(features, factor):
    """f A of a list of rows and a d x k list of rows."""
    return [[sum(f * row[j] for f, row in zip(row_of, factor, strict=True)) for j in range(len(factor[0]))]
            for row_of in features]


def kept_columns(features, count):
    """The columns with the largest norm, ascending; of equal ones the first."""
    norms = [math.sqrt(sum(float(row[j]) ** 2 for row in features)) for j in range(len(features[0]))]
    ranked = sorted(range(len(norms)), key=lambda j: (-norms[j], j))
    return sorted(ranked[:count])


def principal(features, dims):
    """Projections on the first principal axes, by the singular value decomposition of the centred rows."""
    x = np.asarray(features, np.float64)
    centred = x - x.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:dims].T


def nearest_centroids(vector, codebooks):
    """The number of the nearest centroid of each part of a vector."""
    found, start = [], 0
    for book in codebooks:
        part = vector[start : start + len(book[0])]
        squares = [sum((a - b) ** 2 for a, b in zip(part, centroid, strict=True)) for centroid in book]
        found.append(squares.index(min(squares)))
        start += len(book[0])
    return found

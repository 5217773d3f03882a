"""Training on several datasets at once: one list of identities and cameras, no two datasets sharing a number.

The k-th name of ``market+msmt17`` counts its identities and cameras from k * STRIDE, so a label depends on the names
alone, not on how many people a copy happens to hold. Query and gallery are those of the first dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoreid.data.layout import Sample, Splits
from autoreid.errors import UserError

STRIDE = 1_000_000


def join(splits: Sequence[Splits]) -> Splits:
    """The first dataset's splits, its training images joined by those of the others."""
    first = splits[0]
    train = [moved for k, one in enumerate(splits) for moved in _moved(one.name, one.train, k * STRIDE)]
    parts = {one.train_part for one in splits}
    return replace(
        first,
        name="+".join(one.name for one in splits),
        train=tuple(train),
        train_part=parts.pop() if len(parts) == 1 else ", ".join(f"{one.name}: {one.train_part}" for one in splits),
        title=" + ".join(one.title for one in splits),
        edition="+".join(one.edition for one in splits if one.edition),
        names={
            identity + k * STRIDE: name
            for k, one in enumerate(splits)
            for identity, name in one.names.items()
            if identity > 0
        },
    )


def _moved(name: str, samples: Sequence[Sample], offset: int) -> list[Sample]:
    for sample in samples:
        if not (0 < sample.identity < STRIDE and 0 <= sample.camera < STRIDE):
            raise UserError(
                f"dataset '{name}' numbers {sample.path} identity {sample.identity}, camera {sample.camera}; to be joined "
                f"with others all numbers must be below {STRIDE:,}: renumber them"
            )
    return [sample._replace(identity=sample.identity + offset, camera=sample.camera + offset) for sample in samples]

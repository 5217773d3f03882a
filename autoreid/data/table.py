"""All datasets by name, and what a name may say: ``market``, ``msmt17/train+val``, ``market+msmt17``.

After a slash comes a variant: what is trained on, which boxes, which test list. Where every variant has a name the bare
dataset stands for the first. ``+`` joins datasets to train on their union; ``market+500k`` is a dataset of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoreid.data import (
    cuhk03,
    duke,
    market,
    market_500k,
    mars,
    msmt17,
    own_csv,
    own_folder,
    vehicleid,
    veri,
    veri_wild,
    vric,
)
from autoreid.data.layout import Facts, Layout, of_facts
from autoreid.errors import UserError, unknown


@dataclass(frozen=True)
class Dataset:
    """A dataset's facts, its one layout, or its layouts by variant (of a variant the first that is found on disk is read).

    ``drawn`` is (kind, size) where the images are drawn by ``autoreid.data.drawn``.
    """

    source: Facts | Layout | Mapping[str, Sequence[Layout]]
    drawn: tuple[str, str] | None = None

    @property
    def variants(self) -> Mapping[str, Sequence[Layout]]:
        if isinstance(self.source, Mapping):
            return self.source
        return {"": (self.source if isinstance(self.source, Layout) else of_facts(self.source),)}


DATASETS: dict[str, Dataset] = {
    "market": Dataset(market),
    "market+500k": Dataset(market_500k.VARIANTS),
    "msmt17": Dataset(msmt17.VARIANTS),
    "cuhk03": Dataset(cuhk03.VARIANTS),
    "duke": Dataset(duke),
    "mars": Dataset(mars.LAYOUT),
    "veri": Dataset(veri),
    "vehicleid": Dataset(vehicleid.VARIANTS),
    "veri-wild": Dataset(veri_wild.VARIANTS),
    "vric": Dataset(vric.LAYOUT),
    "folder": Dataset(own_folder.LAYOUT),
    "csv": Dataset(own_csv.LAYOUT),
    "drawn-people": Dataset(market, drawn=("people", "small")),
    "drawn-people-tiny": Dataset(market, drawn=("people", "tiny")),
    "drawn-people-market": Dataset(market, drawn=("people", "market")),
    "drawn-vehicles": Dataset(veri, drawn=("vehicles", "small")),
    "drawn-vehicles-tiny": Dataset(veri, drawn=("vehicles", "tiny")),
    "drawn-vehicles-market": Dataset(veri, drawn=("vehicles", "market")),
}


def full_names(base: str) -> list[str]:
    """The full names of a dataset, one per variant."""
    return [f"{base}/{variant}" if variant else base for variant in DATASETS[base].variants]


def resolve(name: str) -> tuple[str, Dataset, Sequence[Layout]]:
    """A single dataset's full name (``cuhk03`` is ``cuhk03/detected``), its entry, and the layouts of the variant."""
    base, _, variant = name.partition("/")
    if base not in DATASETS:
        raise unknown("dataset", base, DATASETS)
    dataset = DATASETS[base]
    known = full_names(base)
    full = known[0] if name == base else name
    if full not in known:
        raise unknown("dataset", name, _numbered(known))
    return full, dataset, dataset.variants[variant or next(iter(dataset.variants))]


def _numbered(known: list[str]) -> list[str]:
    """Names that differ in a final number only, as one: twenty test sets are one word of an error."""
    families: dict[str, list[str]] = {}
    for name in known:
        families.setdefault(re.sub(r"\d+$", "", name), []).append(name)
    return [
        name
        for stem, family in families.items()
        for name in (family if len(family) < 10 else [f"{family[0]} ... {family[-1].removeprefix(stem)}"])
    ]


def split(name: str) -> list[str]:
    """The datasets that a joined name names, each in full; the longest known name first: market+500k, train+val."""
    words, found = name.split("+"), []
    while words:
        for end in range(len(words), 0, -1):
            base, _, _ = (start := "+".join(words[:end])).partition("/")
            if base in DATASETS and (start == base or start in full_names(base)):
                break
        else:
            start, end = words[0], 1
        found.append(resolve(start)[0])  # raises for an unknown one
        words = words[end:]
    if len(found) > 1:
        bases = [full.partition("/")[0] for full in found]
        for base in bases:
            if bases.count(base) > 1:
                raise UserError(f"dataset '{name}' names {base} twice; join different datasets")
        if "folder" in bases:
            raise UserError(
                f"dataset '{name}': 'folder' is --root itself and cannot be joined to datasets inside it; list its images "
                "in a .csv file beside the others' folders and join 'csv'"
            )
    return found

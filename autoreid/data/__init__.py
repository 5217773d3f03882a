"""Datasets as lists of samples: which file shows whom, and from which camera. No torch, no pixels.

``load`` opens only the folders and lists of the parts it is asked for: a search asks for ``("train",)`` and cannot see
query or gallery, whether they exist or not. Files of a folder are sorted by name and lists keep their order, so labels,
splits and batches are the same on every machine. ``check`` looks at everything and says what to mend.

Adding a dataset: a module beside ``market.py`` (names that say everything) or ``vric.py`` (lists), and a line in the
table ``DATASETS`` of ``table.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from autoreid.data import market, veri
from autoreid.data.checking import check, describe
from autoreid.data.comparing import fingerprint, leaks, picture_numbers
from autoreid.data.joining import join
from autoreid.data.layout import DISTRACTOR, JUNK, PARTS, Sample, Splits
from autoreid.data.locate import find
from autoreid.data.table import DATASETS, Dataset, full_names, split
from autoreid.data.veri import veri_oracle
from autoreid.errors import UserError

__all__ = [
    "DATASETS", "DISTRACTOR", "JUNK", "Dataset", "Sample", "Splits", "check", "describe", "fingerprint", "full_names",
    "leaks", "load", "market", "picture_numbers", "veri", "veri_oracle",
]  # fmt: skip


def load(name: str, root: str | os.PathLike[str] | None = None, parts: Sequence[str] = PARTS) -> Splits:
    """The samples of the named parts; no other part's folder or list is opened.

    ``name`` is one of ``DATASETS``, with a variant (``cuhk03/labeled``) or joined to others whose training images are
    added (``market+msmt17``). ``root`` is the folder that holds the dataset's folder, or the dataset's folder itself; a
    drawn dataset needs none and is drawn on first use. Identity -1 is left out everywhere, identity 0 from train and query
    (it is nobody, and matches nobody). Raises UserError: unknown name or part, no root, no such folder, two editions, a
    part missing or empty, names that do not parse, the first listed file not there.
    """
    first, *others = split(name)
    splits = _load(first, root, parts)
    if not others:
        return splits
    if "train" not in parts:  # the others only train
        return replace(splits, name="+".join([first, *others]))
    return join([splits, *(_load(other, root, ("train",)) for other in others)])


def _load(name: str, root: str | os.PathLike[str] | None, parts: Sequence[str]) -> Splits:
    found = find(name, root, parts)
    layout = found.layout
    samples: dict[str, tuple[Sample, ...]] = dict.fromkeys(PARTS, ())
    junk, names = 0, dict[int, str]()
    for part in parts:
        twin = {"query": "gallery", "gallery": "query"}.get(part)
        if twin and layout.one_test_list and samples[twin]:
            samples[part] = samples[twin]
            continue
        reading = found.read(part)
        listed = reading.samples
        if not listed:
            raise found.empty(part, reading)
        if not os.path.exists(listed[0].path):  # a look at every file is for check
            raise UserError(
                f"dataset '{found.name}' at {found.folder}: {part} names {len(listed):,} {layout.unit}, but the first, "
                f"{listed[0].path}, is not there; copy the images to where the list says (`autoreid data` names all "
                "that are missing)"
            )
        left_out = {JUNK} if part == "gallery" else {JUNK, DISTRACTOR}
        samples[part] = tuple(sample for sample in listed if sample.identity not in left_out)
        if not samples[part]:
            raise UserError(
                f"dataset '{found.name}' at {found.folder}: all {len(listed):,} {layout.unit} of {part} have identity -1 "
                "or 0000, which are nobody; number identities from 0001"
            )
        names |= reading.names
        if part == "gallery":
            junk = len(listed) - len(samples[part])
    return Splits(
        found.name,
        **samples,
        protocol=layout.protocol_for(samples["query"], samples["gallery"]),
        junk=junk,
        train_part=layout.train_part,
        title=layout.title,
        edition=layout.edition,
        names=names,
    )

"""The lists of a dataset compared: with each other (who or what is in two of them), and with those of another copy.

Names alone are looked at; only files of one name, identity and camera are opened, to see whether they are one picture.
"""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from autoreid.data.layout import DISTRACTOR, PARTS, Sample, Splits
from autoreid.runs import key_of


def leaking(splits: Splits) -> list[str]:
    """The identities, by their own names, that are in train and in the test."""
    tested = {sample.identity for sample in (*splits.query, *splits.gallery)}
    both = {sample.identity for sample in splits.train if sample.identity > DISTRACTOR} & tested
    return [splits.name_of(identity) for identity in sorted(both)]


def leaks(splits: Splits) -> list[str]:
    """A line for each way in which the lists make a score too good: identities in train and test, files in two parts,
    files listed twice in one. No file is opened, and a part that was not loaded has no fault.

    The parts must come from one load: identities of two datasets have numbers in common and are other people.
    """
    lines = []
    if people := leaking(splits):
        lines.append(
            f"{_counted(people, 'identity is', 'identities are')} in train and in the test, the first "
            f"{_first(people)}: their scores would be too good; take them out of one of the two"
        )
    parts = {part: getattr(splits, part) for part in PARTS}
    if splits.query is splits.gallery:
        del parts["query"]
    where: dict[str, list[str]] = {}
    twice: dict[str, str] = {}
    for part, samples in parts.items():
        counts = Counter(sample.path for sample in samples)
        twice |= {path: part for path, count in counts.items() if count > 1 and path not in twice}
        for path in counts:
            where.setdefault(path, []).append(part)
    # A query may lie in the gallery where its camera leaves it out of its own ranking.
    apart = {("query", "gallery")} if splits.protocol != "plain" else set()
    if both := sorted(path for path, of in where.items() if len(of) > 1 and tuple(of) not in apart):
        lines.append(
            f"{_counted(both, 'file is', 'files are')} in two parts, the first is {both[0]} "
            f"({' and '.join(where[both[0]])}); list each in one part"
        )
    if again := sorted(twice):
        lines.append(
            f"{_counted(again, 'file is', 'files are')} listed twice in one part, the first is {again[0]} "
            f"({twice[again[0]]}); list each once"
        )
    return lines


def _counted(found: Sequence[str], one: str, more: str) -> str:
    return f"{len(found):,} {one if len(found) == 1 else more}"


def _first(names: Sequence[str]) -> str:
    return f"is {names[0]}" if len(names) == 1 else f"are {', '.join(names[:3])}"


def fingerprint(splits: Splits, parts: Iterable[str] = PARTS) -> str:
    """Twelve hexadecimal digits that stand for who is seen in which file by which camera, in each of these parts.

    The same wherever the copy lies and however its folders are listed. ``evaluate`` loads no training images: what it is
    to agree with must be of ``("query", "gallery")`` too.
    """
    return key_of({part: sorted(_key(splits, sample) for sample in getattr(splits, part)) for part in parts})


def _key(splits: Splits, sample: Sample) -> list[str | int]:
    return [os.path.basename(sample.path), splits.name_of(sample.identity), sample.camera, len(sample.frames)]


def picture_numbers(query: Sequence[Sample], gallery: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """A number per sample, the same for two that are one picture: one path, or one identity, camera, file name and content
    (VeRi keeps every query in its gallery's folder too). For ``protocols.Tags``: a rule without cameras leaves a query's
    own picture out of its ranking by them."""
    numbers: dict[str, int] = {}
    asked: dict[tuple[str, int, int], list[str]] = {}
    for sample in query:
        if sample.path not in numbers:
            numbers[sample.path] = len(numbers)
            asked.setdefault((os.path.basename(sample.path), *sample[1:3]), []).append(sample.path)
    for sample in gallery:
        if sample.path not in numbers:
            twins = asked.get((os.path.basename(sample.path), *sample[1:3]), [])
            twin = next((path for path in twins if _same_content(path, sample.path)), None)
            numbers[sample.path] = len(numbers) if twin is None else numbers[twin]
    return [numbers[sample.path] for sample in query], [numbers[sample.path] for sample in gallery]


def _same_content(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # that a file is not there is for others to say
        return False

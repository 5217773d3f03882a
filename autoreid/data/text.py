"""Lists as people pass them on: any of four encodings, Windows line ends and backslashes, blank lines.

UTF-16 is known by its byte order mark (Excel's "Unicode text"). Else UTF-8 is tried first (with or without a mark), then
GB2312 (VeRi-776's own files), and Latin-1, which takes any byte, last.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator

from autoreid.errors import UserError


def text_of(path: str) -> str:
    """The text of a file, with plain line ends."""
    with open(path, "rb") as file:
        data = file.read()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) * wide + ("utf-8-sig", "gb2312", "latin-1"):
        try:
            return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes every byte")


def lines_of(path: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, without surrounding spaces, each with its number from 1."""
    for number, line in enumerate(text_of(path).split("\n"), start=1):  # not splitlines: a name may hold U+2028
        if line.strip():
            yield number, line.strip()


def rows_of(path: str, integers: int, example: str) -> Iterator[tuple[int, str, list[int]]]:
    """The lines of a list: its number, a relative path with plain slashes, and the whole numbers that follow it."""
    for number, line in lines_of(path):
        fields = line.rsplit(None, integers) if integers else [line]
        try:
            numbers = [int(field) for field in fields[1:]]
        except ValueError:
            numbers = []
        if len(fields) != integers + 1 or len(numbers) != integers:
            raise bad_line(path, number, line, example)
        yield number, fields[0].replace("\\", "/"), numbers


def bad_line(path: str, number: int, line: str, example: str) -> UserError:
    """A line of a list that does not say what it should."""
    return UserError(f"{path} line {number}: '{line}' is not like '{example}'; copy {os.path.basename(path)} again")

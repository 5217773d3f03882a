"""What a user wrote, as ``--set key=value`` or in a file, in the type of the field it is meant for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from autoreid.errors import UserError, unknown

Settings = TypeVar("Settings")


def split_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """``["epochs=3", "lr=0.1"]`` to a dict; a pair without ``=`` is a :class:`UserError`."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: give key=value, as in --set epochs=60")
    return {key.strip(): value.strip() for key, value in (pair.split("=", 1) for pair in pairs)}


def parse(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``, from the text of an option or from a JSON file.

    A tuple is written with commas (``2,2,2,2``; a size also as ``256x128``), "none" stands for None, and a field whose
    default is None holds a whole number.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word",
             tuple: "whole numbers as in 2,2,2,2"}
    try:
        return _from_text(value, default) if isinstance(value, str) else _from_json(value, default)
    except (ValueError, KeyError, OverflowError):
        kind = kinds.get(type(default), "a whole number or none")
        raise UserError(f"{name}={value}: {name} must be {kind} (default {default})") from None


def _from_text(text: str, default: Any) -> Any:
    if default is None:
        return None if text == "none" else int(text)
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(default, tuple):
        return tuple(int(part) for part in text.replace("x", ",").split(",")) if text else ()
    if isinstance(default, float) and not math.isfinite(float(text)):
        raise ValueError
    return type(default)(text)


def _from_json(value: Any, default: Any) -> Any:
    if value is None and default is None:
        return None
    if isinstance(default, tuple) and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return tuple(value)
    if isinstance(default, float):
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        raise ValueError
    if type(value) is type(default) or (default is None and type(value) is int):
        return value
    raise ValueError


def read_json(path: str | Path, what: str) -> Any:
    """The JSON in ``path``; a missing or damaged file is a :class:`UserError` that names ``what`` it should hold."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such {what} file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors write a byte order mark
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not valid JSON ({fault})") from None


def changed(settings: Settings, changes: Mapping[str, Any], what: str, follow_epochs: Iterable[str] = ()) -> Settings:
    """A copy of a dataclass with fields replaced. One :class:`UserError` names every value of the wrong type and every
    unknown field, with the nearest known ones.

    The fields in ``follow_epochs`` (a warm-up, milestones) keep their share of the epochs when only ``epochs`` is
    changed, so that a short trial of a long recipe needs one option.
    """
    defaults = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    values, faults = {}, []
    for key in sorted(changes, key=lambda key: key not in defaults):  # the unknown last: their error lists all fields
        try:
            if key not in defaults:
                raise unknown(f"{what} field", key, defaults)
            values[key] = parse(key, changes[key], defaults[key])
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError("; ".join([*(fault.partition(" known: ")[0].rstrip(";") for fault in faults[:-1]), faults[-1]]))
    if "epochs" in values:
        for name in follow_epochs:
            values.setdefault(name, _share(defaults[name], values["epochs"], defaults["epochs"]))
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


def _share(value: Any, epochs: int, before: int) -> Any:
    return tuple(_share(v, epochs, before) for v in value) if isinstance(value, tuple) else value * epochs // before


Check = tuple[bool, str, Any, str]  # whether it fits, the name, the value, what is allowed


def faults_of(checks: Iterable[Check]) -> list[str]:
    """The one wording for a value out of range, of every check that does not fit."""
    return [f"{name}={value}: allowed is {allowed}" for fits, name, value, allowed in checks if not fits]


def range_checks(settings: Any, **ranges: tuple[float, float, str]) -> list[Check]:
    """Every named number of a dataclass within (lowest, highest, words); NaN and infinity are within no range."""
    values = {name: getattr(settings, name) for name in ranges}
    return [(values[name] is None or low <= values[name] <= high, name, values[name], words)
            for name, (low, high, words) in ranges.items()]


def require_ranges(settings: Any, **ranges: tuple[float, float, str]) -> None:
    """A :class:`UserError` that names every number out of its range."""
    if faults := faults_of(range_checks(settings, **ranges)):
        raise UserError("; ".join(faults))


def require(fits: bool, name: str, value: Any, allowed: str) -> None:
    """A :class:`UserError` unless the value fits."""
    if not fits:
        raise UserError(*faults_of([(fits, name, value, allowed)]))

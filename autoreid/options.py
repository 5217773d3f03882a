"""``--set key=value``: the user's text in the type of the field's default, for settings, recipes and model options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from autoreid.errors import UserError, unknown

Settings = TypeVar("Settings")


def split_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """``["epochs=3", "lr=0.1"]`` to a dict; a pair without ``=`` is a :class:`UserError`."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: give key=value, as in --set epochs=60")
    return {key.strip(): value.strip() for key, value in (pair.split("=", 1) for pair in pairs)}


def parse(name: str, text: Any, default: Any) -> Any:
    """``text`` in the type of ``default``; anything that is not text is returned as it is.

    A tuple is written with commas (``2,2,2,2``; a size also as ``256x128``), "none" stands for None, and a field whose
    default is None holds a whole number.
    """
    if not isinstance(text, str):
        return tuple(text) if isinstance(default, tuple) and isinstance(text, list) else text
    try:
        if default is None:
            return None if text == "none" else int(text)
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.replace("x", ",").split(",") if part)
        return type(default)(text)
    except (ValueError, KeyError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", tuple: "whole numbers as in 2,2,2,2"}
        kind = kinds.get(type(default), "a whole number or none")
        raise UserError(f"{name}={text}: {name} must be {kind} (default {default})") from None


def changed(settings: Settings, changes: Mapping[str, Any], what: str, follow_epochs: Iterable[str] = ()) -> Settings:
    """A copy of a dataclass with fields replaced; an unknown field is a :class:`UserError` that lists the known.

    The fields in ``follow_epochs`` (a warm-up, milestones) keep their share of the epochs when only ``epochs`` is
    changed, so that a short trial of a long recipe needs one option.
    """
    defaults = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    for key in changes:
        if key not in defaults:
            raise unknown(f"{what} field", key, defaults)
    values = {key: parse(key, value, defaults[key]) for key, value in changes.items()}
    if "epochs" in values:
        for name in follow_epochs:
            values.setdefault(name, _share(defaults[name], values["epochs"], defaults["epochs"]))
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


def _share(value: Any, epochs: int, before: int) -> Any:
    return tuple(_share(v, epochs, before) for v in value) if isinstance(value, tuple) else value * epochs // before


def require(fits: bool, name: str, value: Any, allowed: str) -> None:
    """The one wording for a value out of range."""
    if not fits:
        raise UserError(f"{name}={value}: allowed is {allowed}")

"""The one exception for what a user got wrong, and the one way to say that a name is unknown.

The command line turns a :class:`UserError` into one line on stderr and exit status 2; anything else is our own
fault and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: says what was given, what is allowed and what to do, in one line."""


def unknown(what: str, given: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: the nearest spelling first, then every known name.

    >>> str(unknown("operation", "sep_conv3x3", ["sep_conv_3x3", "none"]))
    "unknown operation 'sep_conv3x3'; did you mean 'sep_conv_3x3'? known: none, sep_conv_3x3"
    """
    names = sorted(known)
    bare = {name.lstrip("-"): name for name in names}  # the dashes that all options have make none alike
    nearest = difflib.get_close_matches(str(given).lstrip("-"), bare, n=1)
    hint = f" did you mean '{bare[nearest[0]]}'?" if nearest else ""
    return UserError(f"unknown {what} '{given}';{hint} known: {', '.join(names)}")

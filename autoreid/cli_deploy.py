"""The commands of a trained network's life: spending less at run time, a gallery in use, a file to deploy.

As in ``cli``: every command parses, calls one function of the package and prints what it returns; torch is imported inside
the commands.
"""

from __future__ import annotations

from collections.abc import Callable

from autoreid.cli_parts import Parser

COMMANDS: tuple[str, ...] = ()
RESUMABLE: tuple[str, ...] = ()  # what SIGTERM stops with its state saved


def add_commands(command: Callable[..., Parser]) -> None:
    """Add the parsers; ``command(name, text, example, run)`` makes one."""

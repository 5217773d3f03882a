"""What every command's options and words are made of: the parser, options that mean the same everywhere, and how figures,
the next command and a user's mistake are said.

Nothing here imports torch before a command runs: ``autoreid --help`` must answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from autoreid.errors import UserError, unknown
from autoreid.runs import is_first, say

if TYPE_CHECKING:
    from autoreid.evaluate import Evaluation

# Spelled out, because the help must not import numpy.
PROTOCOL_NAMES = ("market1501, msmt17, cuhk03-np, cuhk03-classic, veri, vehicleid/test-800 (-1600, -2400, -3200, -6000, "
                  "-13164), vric, veri-wild, mars or plain")


class Parser(argparse.ArgumentParser):
    """Argparse with one line for a mistake, the nearest spelling for a mistyped option, and no abbreviations."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's, but an option this command does not have is named here, with the nearest it has."""
        self._words = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("-"):
                raise unknown(f"option of {self.prog}", word.split("=")[0], self._option_string_actions)
        return found, rest

    def error(self, message: str) -> NoReturn:
        if "required" in message:  # an option with an optional value took what is missing
            for option, value in pairwise(self._words):
                action = self._option_string_actions.get(option)
                if action is not None and action.nargs == "?" and not value.startswith("-"):
                    message += f"; {option} took '{value}' for its value: put {option} last"
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, [], argparse.SUPPRESS):
            return action.help or ""
        return super()._get_help_string(action) or ""


# ---------------------------------------------------------------------------------------- options, the same everywhere
def size(text: str) -> list[int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no picture size: give HEIGHTxWIDTH, as in 256x128") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no picture size: both sides must be at least 1")
    return [height, width]


def whole(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to {2**31 - 1}")
    return int(text)


def dataset_option(p: Parser, positional: bool = False) -> None:
    text = ("market, market+500k, msmt17[/train+val], cuhk03[/labeled|/detected-classic-N], duke, mars, veri, "
            "vehicleid[/test-N], veri-wild[/test-N], vric, folder, csv, drawn-people[-tiny|-market] or "
            "drawn-vehicles[-tiny|-market]; market+msmt17 trains on both and tests on the first")
    if positional:
        p.add_argument("dataset", metavar="NAME", help=text)
    else:
        p.add_argument("--dataset", metavar="NAME", required=True, help=text)
    p.add_argument("--root", metavar="DIR", help="the folder that holds the dataset's folder, or the dataset's folder "
                   "itself (drawn data: where to keep it; default the user's cache folder)")


def running_options(p: Parser, out: str) -> None:
    p.add_argument("--out", metavar="DIR", default=out, help="where to write")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run, to the same end")
    p.add_argument("--overwrite", action="store_true", help="start anew where a run or result lies already")


def seed_option(p: Parser) -> None:
    p.add_argument("--seed", type=whole, default=0, metavar="N", help="of all random choices (not of the drawn data)")


def training_options(p: Parser) -> None:
    seed_option(p)
    p.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that load pictures, 0 for none")
    p.add_argument("--epochs", type=int, metavar="N", help="instead of the preset's or recipe's")
    p.add_argument("--input", type=size, metavar="HxW", help="picture size, instead of the preset's or recipe's")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                   help="any other field, repeated for several; a KEY that is none lists them all")


def protocol_option(p: Parser) -> None:
    p.add_argument("--protocol", metavar="NAME", help=f"{PROTOCOL_NAMES}; default the tested dataset's own")


def evaluation_options(p: Parser) -> None:
    """What retrain's and evaluate's figures may differ in beside the views."""
    p.add_argument("--rerank", nargs="?", const="20,6,0.3", metavar="K1,K2,LAMBDA", help="k-reciprocal re-ranking, by "
                   "default with the paper's 20,6,0.3: all queries are used together")
    p.add_argument("--expand", nargs="?", const="10,3", metavar="K,ALPHA", help="query expansion over the K nearest, "
                   "weights similarity^ALPHA (0: the plain mean)")
    p.add_argument("--denominator", default="scored", metavar="NAME", help="of the means over queries: scored, or all "
                   "(a query without a match counts as zero)")
    p.add_argument("--frames", default="mean", metavar="NAME", help="a tracklet's feature over its frames': mean or max")
    p.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read; they are named "
                   "and counted")


def views_options(p: Parser, default: str) -> None:
    p.add_argument("--flip", action="store_true", help="average in the mirror image: --views 2")
    p.add_argument("--views", type=whole, metavar="N", help="of a picture, whose features are averaged: 1, 2 (its mirror "
                   f"image too) or 10 (five crops, mirrored); default {default}")


def cache_option(p: Parser) -> None:
    p.add_argument("--cache", metavar="DIR", help="keep decoded and resized pictures in a file here, shared by all runs; "
                   "default: in memory where they fit in 1 GiB")


def picture_options(p: Parser, text: str) -> None:
    p.add_argument("--picture", metavar="FILE.png", help=text)
    p.add_argument("--overwrite", action="store_true", help="replace the file at --picture")


def json_option(p: Parser) -> None:
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")


# ---------------------------------------------------------------------------------------- what is said and asked
def print_figures(args: argparse.Namespace, figures: Any, text: str) -> None:
    if is_first():
        print(json.dumps(figures) if args.json else text, flush=True)


def propose(text: str) -> None:
    """The next sensible command."""
    say(f"next: {pastable(text)}")


def pastable(text: str) -> str:
    """A command that begins with autoreid, with the path of the program where it is not on the PATH."""
    program = Path(sys.argv[0])
    if shutil.which("autoreid") is None and program.name == "autoreid":
        return text.replace("autoreid", os.path.relpath(program), 1)
    return text


def root_of(args: argparse.Namespace) -> str:
    return f" --root {shlex.quote(args.root)}" if args.root else ""


def evaluation_of(args: argparse.Namespace) -> Evaluation:
    """The evaluation that retrain's and evaluate's options describe."""
    from autoreid.evaluate import Evaluation

    if args.flip and args.views not in (None, 2):
        raise UserError(f"--flip means --views 2, and --views {args.views} is given: leave one of them out")
    views = 2 if args.flip else 1 if args.views is None else args.views
    rerank = numbers_of("--rerank", args.rerank, "K1,K2,LAMBDA as in 20,6,0.3", (int, int, float))
    expand = numbers_of("--expand", args.expand, "K,ALPHA as in 10,3", (int, float))
    return Evaluation(views, args.frames, rerank, expand, args.denominator, args.skip_unreadable)


def numbers_of(option: str, text: str | None, example: str, kinds: Sequence[type]) -> Any:
    """The numbers of an option's text, or None where it is not given."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for kind, part in zip(kinds, text.split(","), strict=True))
    except ValueError:
        raise UserError(f"{option} {text}: give {example}") from None


def require_protocol(name: str | None) -> None:
    """Before a dataset is looked for."""
    from autoreid.metrics import PROTOCOLS

    if name is not None and name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)


def may_write(option: str, path: str | None, overwrite: bool, ending: str = "") -> None:
    """Before the work whose outcome the file is to hold."""
    if path is None:
        return
    if not path.endswith(ending):
        raise UserError(f"{option} {path}: give the name of a {ending} file")
    if Path(path).is_dir():
        raise UserError(f"{option} {path} is a folder: give the name of a file in it")
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} is there already: add --overwrite to replace it, or give another {option}")
    there = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{option} {path}: {there} is no folder that can be written to; give another {option}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    from autoreid.options import split_pairs

    changes: dict[str, Any] = dict(split_pairs(args.changes))
    for name in ("epochs", "input"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return changes


def preset_of(dataset: str) -> str:
    """Drawn pictures are small and meant for CPUs; everything else gets the field's settings."""
    return "drawn" if dataset.startswith("drawn-") else "default"


def provenance_of(command: str, dataset: str, method: str, seed: int) -> dict[str, Any]:
    from autoreid.runs import commit

    return {"command": command, "dataset": dataset, "method": method, "seed": seed, "commit": commit()}


def device_of(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
    return name


def set_threads() -> None:
    """Physical cores shared with others make torch's threads wait for each other; OMP_NUM_THREADS overrides."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))

"""What a training or search tells while it runs: a row per epoch in a CSV, and in TensorBoard where it is installed.

The CSV is written whole after every epoch. A resumed run first drops the rows after its checkpoint: they are made again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoreid import parallel
from autoreid.runs import rows_up_to, write_text


class Curves:
    """``<folder>/curves.csv`` with the given columns after ``epoch``, and TensorBoard's events beside it.

    ``first`` is the epoch (from 0) with which this process begins. Of processes that train together the first writes.
    """

    def __init__(self, folder: Path, columns: str, first: int, tensorboard: bool = True) -> None:
        self.path, self.columns = folder / "curves.csv", columns.split(",")
        self.rows = rows_up_to(self.path, first) or [",".join(["epoch", *self.columns])]
        self._events: Any = None
        if tensorboard and parallel.is_first() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=first)

    def add(self, epoch: int, figures: Mapping[str, float | None]) -> None:
        """One epoch's figures, by column; None leaves a cell empty."""
        if not parallel.is_first():
            return
        self.rows.append(",".join([str(epoch), *(cell_text(figures[name]) for name in self.columns)]))
        write_text(self.path, "\n".join(self.rows) + "\n")
        if self._events:
            for name in self.columns:
                if figures[name] is not None:
                    self._events.add_scalar(name, figures[name], epoch)
            self._events.flush()

    def read(self, column: str) -> list[tuple[int, float | None]]:
        """(epoch, figure) of every row there is."""
        place = 1 + self.columns.index(column)
        cells = [row.split(",") for row in self.rows[1:]]
        return [(int(row[0]), float(row[place]) if row[place] else None) for row in cells]

    def close(self) -> None:
        if self._events:
            self._events.close()


def cell_text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

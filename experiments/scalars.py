"""Rows of metrics as TensorBoard's event files, written without TensorFlow."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class Scalars:
    """The event files of one arm. They begin with the rows that there are, in place of earlier files."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]):
        # An event file cannot lose its last entries, which a resumed run repeats: it is written again.
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes each number of a row that has an epoch."""
        for name, value in row.items():
            if name != 'epoch' and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(row['epoch']))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

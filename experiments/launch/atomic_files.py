"""Files that are there whole or not at all, whenever the process that writes them is killed."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, with line ends as they are in the text, beside the file's place and then moves it there."""
    draft = path.with_name(f'.{path.name}.draft')
    draft.write_text(text, encoding='utf-8', newline='')
    os.replace(draft, path)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV; the first one names the columns."""
    table = io.StringIO(newline='')
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())

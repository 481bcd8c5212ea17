"""Files that are there whole or not at all, whenever the process that writes them is killed."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, with line ends as they are in the text, beside the file's place and then moves it there."""
    draft = path.with_name(f'.{path.name}.draft')
    draft.write_text(text, encoding='utf-8', newline='')
    os.replace(draft, path)

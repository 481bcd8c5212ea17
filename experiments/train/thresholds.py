"""What a trained run knows: its classes, and how far from the nearest center an image is still one of theirs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.launch.run_folder import KNOWN, RunError, read_json, reading, write_json

# Share of the held-out examples of known classes that are accepted.
ACCEPTED = 0.95


def reach_of(distances: np.ndarray) -> float:
    """The distance to the nearest center within which lie 95 % of held-out examples of known classes, `[N]`."""
    return float(np.quantile(distances, ACCEPTED, method='higher'))


def write_known(out: Path, class_names: Sequence[str], reach: Mapping[str, float]) -> None:
    """Writes the names of the classes and the reach of each arm to the folder of a run."""
    write_json(out / KNOWN, {'class_names': list(class_names), 'reach': dict(reach)})


def read_known(out: Path) -> tuple[tuple[str, ...], dict[str, float]]:
    """The names of the classes and the reach of each arm of a finished run; NaN, within which lies nothing, if it had
    none."""
    path = out / KNOWN
    if not path.exists():
        raise RunError(f'{out} holds no finished run; name the --out of one, or finish it with --resume')
    cure = "give the run's line again with --resume, which makes it anew"
    known = read_json(path, cure)
    with reading(path, cure):
        reach = {arm: math.nan if distance is None else float(distance) for arm, distance in known['reach'].items()}
        return tuple(known['class_names']), reach

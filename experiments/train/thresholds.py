"""The known classes of a run, and the distance to the nearest center beyond which an image is of no known class."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.launch.errors import RunError
from experiments.launch.run_folder import KNOWN, read_json, reading, write_json

# Share of the test examples of known classes that are accepted.
ACCEPTED = 0.95


def threshold_of(distances: np.ndarray) -> float:
    """Returns the distance within which 95 % of the test examples of known classes lie, from their distances `[N]`."""
    return float(np.quantile(distances, ACCEPTED, method='higher'))


def write_known(out: Path, class_names: Sequence[str], thresholds: Mapping[str, float]) -> None:
    """Writes the class names and the threshold of each arm to the folder of a run."""
    write_json(out / KNOWN, {'class_names': list(class_names), 'reach': dict(thresholds)})


def read_known(out: Path) -> tuple[tuple[str, ...], dict[str, float]]:
    """Reads the class names and the threshold of each arm of a finished run. A missing threshold is NaN."""
    path = out / KNOWN
    if not path.exists():
        raise RunError(f'{out} holds no finished run; name the --out of one, or finish it with --resume')
    cure = 'resume the run with --resume, which writes the file again'
    known = read_json(path, cure)
    with reading(path, cure):
        reach = known['reach'].items()
        thresholds = {arm: math.nan if distance is None else float(distance) for arm, distance in reach}
        return tuple(known['class_names']), thresholds

"""What the pictures show of each epoch, kept in a file an epoch, so that a run that was stopped has its whole film."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from experiments.launch import processes
from experiments.launch.atomic_files import draft
from experiments.launch.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What one arm looks like after one epoch: N examples, D feature dimensions, C classes."""

    epoch: int
    train_features: np.ndarray  # [N, D]
    train_labels: np.ndarray  # [N]
    test_features: np.ndarray  # [M, D]
    test_labels: np.ndarray  # [M]
    centers: np.ndarray  # [C, D]
    test_accuracy: float  # in [0, 1], as the next
    nearest_center_accuracy: float
    intra_inter_ratio: float  # of the test set; not a number where the features have collapsed
    collapsed: bool


class History:
    """The snapshots of one arm, epoch 0 (before training) first, and their files `ARM-EPOCH.npz` in a folder."""

    def __init__(self, folder: Path, arm: str):
        self._folder, self._arm = folder, arm
        self.snapshots: list[Snapshot] = []

    def add(self, snapshot: Snapshot) -> None:
        """Keeps the snapshot of the epoch that comes next; the earlier ones of a resumed arm are read."""
        self.read(snapshot.epoch - 1)
        self.snapshots.append(snapshot)
        if processes.is_main_process():
            self._folder.mkdir(exist_ok=True)
            save_snapshot(self._path(snapshot.epoch), snapshot)

    def read(self, epoch: int) -> None:
        """Reads the snapshots up to an epoch that are not here yet."""
        for path in map(self._path, range(len(self.snapshots), epoch + 1)):
            if not path.exists():
                raise RunError(f'{path} is missing, so the run cannot go on; pass --overwrite to start it anew')
            self.snapshots.append(load_snapshot(path))

    def _path(self, epoch: int) -> Path:
        return self._folder / f'{self._arm}-{epoch}.npz'


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    with draft(path) as file:
        np.savez(file, **dataclasses.asdict(snapshot))


def load_snapshot(path: Path) -> Snapshot:
    try:
        with np.load(path) as arrays:
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return Snapshot(**values)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f'{path} is damaged ({error}); pass --overwrite to start the run anew') from error

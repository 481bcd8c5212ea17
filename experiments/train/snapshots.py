"""The data of the figures after each epoch, in one file per epoch, so that a resumed run can draw all epochs."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from experiments.launch import processes
from experiments.launch.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One arm after one epoch: N train and M test examples, D feature dimensions, C classes."""

    epoch: int
    train_features: np.ndarray  # [N, D]
    train_labels: np.ndarray  # [N]
    test_features: np.ndarray  # [M, D]
    test_labels: np.ndarray  # [M]
    centers: np.ndarray  # [C, D]
    test_accuracy: float  # in [0, 1]
    nearest_center_accuracy: float  # in [0, 1], of the test set
    intra_inter_ratio: float  # of the test set; NaN if all features are equal
    collapsed: bool


class History:
    """The snapshots of one arm from epoch 0 (before training) on, with a file `ARM-EPOCH.npz` for each."""

    def __init__(self, folder: Path, arm: str):
        self._folder, self._arm = folder, arm
        self.snapshots: list[Snapshot] = []

    def add(self, snapshot: Snapshot) -> None:
        """Adds the snapshot of the next epoch, after it has read the earlier ones of a resumed arm."""
        self.read(snapshot.epoch - 1)
        self.snapshots.append(snapshot)
        if processes.first():
            self._folder.mkdir(exist_ok=True)
            save_snapshot(self._path(snapshot.epoch), snapshot)

    def read(self, epoch: int) -> None:
        """Reads the missing snapshots up to an epoch."""
        for path in map(self._path, range(len(self.snapshots), epoch + 1)):
            if not path.exists():
                raise RunError(f'{path} is missing, so the run cannot continue; pass --overwrite to start again')
            self.snapshots.append(load_snapshot(path))

    def _path(self, epoch: int) -> Path:
        return self._folder / f'{self._arm}-{epoch}.npz'


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    np.savez(path, **dataclasses.asdict(snapshot))


def load_snapshot(path: Path) -> Snapshot:
    try:
        with np.load(path) as arrays:
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return Snapshot(**values)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f'{path} is damaged ({error}); pass --overwrite to start the run again') from error

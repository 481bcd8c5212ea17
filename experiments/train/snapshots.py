"""The data of the figures after each epoch, in one file per epoch, so that a resumed run can draw all epochs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.launch import processes
from experiments.launch.atomic_files import draft
from experiments.launch.errors import DamagedError
from experiments.launch.run_folder import reading


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
    """The snapshots of one arm by epoch, from 0 (before training) on, with a file `ARM-EPOCH.npz` for each."""

    def __init__(self, folder: Path, arm: str):
        self._folder, self._arm = folder, arm
        self.snapshots: dict[int, Snapshot] = {}

    def add(self, snapshot: Snapshot) -> None:
        """Adds a snapshot and writes its file."""
        self.snapshots[snapshot.epoch] = snapshot
        if processes.is_main_process():
            self._folder.mkdir(exist_ok=True)
            save_snapshot(self._path(snapshot.epoch), snapshot)

    def read(self, epochs: int, tell: Callable[[str], None]) -> None:
        """Reads the missing snapshots before `epochs`, and prints which files are left out."""
        for epoch in sorted(set(range(epochs)) - self.snapshots.keys()) if processes.is_main_process() else ():
            try:
                self.snapshots[epoch] = load_snapshot(self._path(epoch))
            except DamagedError as error:
                tell(f'{str(error).partition(";")[0]}; the animation leaves out epoch {epoch}')

    def _path(self, epoch: int) -> Path:
        return self._folder / f'{self._arm}-{epoch}.npz'


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    with draft(path) as file:
        np.savez(file, **dataclasses.asdict(snapshot))


def load_snapshot(path: Path) -> Snapshot:
    cure = 'put back a copy of it, or start the run anew with --overwrite'
    with reading(path, cure), path.open('rb') as file, np.load(file) as arrays:
        return Snapshot(**{name: array if array.ndim else array.item() for name, array in arrays.items()})

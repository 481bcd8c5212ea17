"""What the pictures show of each epoch, kept in a file an epoch, so that a run that was stopped has its whole film."""

import dataclasses
from pathlib import Path

import numpy as np

from experiments import processes
from experiments.panel import Snapshot
from experiments.runs import RunError


class History:
    """The snapshots of one arm, epoch 0 (before training) first, and their files `ARM-EPOCH.npz` in a folder."""

    def __init__(self, folder: Path, arm: str):
        self._folder, self._arm = folder, arm
        self.snapshots: list[Snapshot] = []

    def add(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        if processes.first():
            self._folder.mkdir(exist_ok=True)
            np.savez(self._path(snapshot.epoch), allow_pickle=False, **dataclasses.asdict(snapshot))

    def load(self, epoch: int) -> None:
        """Reads all snapshots up to an epoch."""
        for path in map(self._path, range(epoch + 1)):
            if not path.exists():
                raise RunError(f'{path} is missing, so the run cannot go on; pass --overwrite to start it anew')
            with np.load(path) as arrays:
                values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
            self.snapshots.append(Snapshot(**values))

    def _path(self, epoch: int) -> Path:
        return self._folder / f'{self._arm}-{epoch}.npz'

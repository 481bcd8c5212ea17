"""Saves of a run by Orbax: all that its next step depends on, so that it goes on as if it had never stopped.

A save holds the parameters, the centers, the optimizer's state and the step, as one copy on the host: it knows
nothing of devices and can be read back on any number of them. Beside them are the position in the data and the
sums over the part of the epoch that is done. Nothing else is random or remembered.
"""

import functools
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from experiments.launch import processes
from experiments.launch.mesh import Devices
from experiments.launch.run_folder import RunError
from experiments.launch.stopping import Stop
from experiments.train.step import Tally

KEPT = 2

# Several processes must save at the same step. To agree on it each time would make them wait for their devices.
AGREE_EVERY = 16

RECIPE = (
    'To keep the network and start new centers see "Runs that survive" in README: checkpoints.keep_network; '
    'or name another --out'
)


class Checkpoints:
    """The saves of one arm in a folder of their own, `every` so many seconds. Use it in a `with` statement."""

    def __init__(self, folder: Path, every: float, stop: Stop, devices: Devices):
        self._folder = folder
        self._manager = _manager(folder, max_to_keep=KEPT)
        self._every, self._stop, self._devices = every, stop, devices
        self._last, self._calls = time.monotonic(), 0

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def due(self) -> bool:
        wanted = time.monotonic() - self._last >= self._every
        if processes.several():
            self._calls += 1
            if self._calls % AGREE_EVERY:
                return False
            (wanted,) = self._stop.synchronize(wanted)
        return self._stop.requested or bool(wanted)

    def save(self, state: TrainState, batches: grain.DatasetIterator, tally: Tally) -> None:
        """Saves in the background. If the run was asked to stop, waits for the save and raises Stopped."""
        host = self._devices.fetch(state)
        rest = {'position': batches.get_state(), 'tally': tally}
        items = {
            'state': ocp.args.StandardSave(host),
            'rest': ocp.args.JsonSave({**rest, 'checksum': _checksum(host, rest)}),
        }
        self._manager.save(int(host.step), args=ocp.args.Composite(**items), force=True)
        self._last = time.monotonic()
        if self._stop.requested:
            self._manager.wait_until_finished()
            self._stop.raise_if_requested()

    def restore(
        self, like: TrainState, batches: grain.DatasetIterator, tell: Callable[[str], None]
    ) -> tuple[TrainState, Tally] | None:
        """The newest save that is whole, or None; `batches` go on from there. Those after it are named and removed."""
        for path in _unfinished(self._folder, self._manager) if processes.is_main_process() else ():
            tell(f'{path} is unfinished; it is left out')
            shutil.rmtree(path)
        processes.barrier('unfinished saves are gone')
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                _check_shapes(self._manager.item_metadata(step)['state'], like)
                state, rest = _read(self._manager, step, like)
            except RunError:
                raise
            except Exception as error:  # whatever a damaged file leads to, in Orbax or in what is below it
                tell(f'{self._folder / str(step)} is damaged; it is left out ({_reason(error)})')
                self._manager.delete(step)
                continue
            batches.set_state(rest['position'])
            return state, Tally(*rest['tally'])
        return None


def newest(folder: Path) -> int:
    """The last step that any arm has saved, 0 if none has; `folder` holds a folder for each."""
    return max((int(path.name) for path in folder.glob('*/*') if path.name.isdecimal()), default=0)


def saved_params(folder: Path | str) -> dict[str, Any]:
    """Parameters and centers of the newest save in a folder of one arm, `{'params': ..., 'centers': ...}`, in NumPy."""
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns that it will not write
    with _manager(Path(folder), read_only=True, create=False, save_interval_steps=0) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(f'{folder} holds no save; name a folder such as runs/toy2d/checkpoints/center')
        try:
            return _read(manager, step)[0]['params']
        except Exception as error:
            raise RunError(
                f'{Path(folder) / str(step)} is damaged ({_reason(error)}); remove report.html of its run and give '
                "the run's line again with --resume, which makes the save anew"
            ) from error


def keep_network(params: Any, saved: Any) -> Any:
    """`params` of a new network with each array of the `saved` one that has the same name and shape."""
    old = {(name, leaf.shape): leaf for name, leaf in _named(saved)}
    return jax.tree_util.tree_map_with_path(lambda path, new: old.get((_name(path), new.shape), new), params)


@functools.cache
def _forget_abandoned_reads() -> None:
    """Of many reads at once one meets the damage and Orbax abandons the others: each would print a traceback, later."""
    hook = sys.unraisablehook

    def unless_abandoned(unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            hook(unraisable)

    sys.unraisablehook = unless_abandoned
    logging.getLogger('asyncio').addFilter(lambda record: 'never retrieved' not in record.getMessage())


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    _forget_abandoned_reads()
    handlers = {'state': ocp.StandardCheckpointHandler(), 'rest': ocp.JsonCheckpointHandler()}
    # Orbax takes absolute paths only.
    return ocp.CheckpointManager(
        folder.absolute(), item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def _read(manager: ocp.CheckpointManager, step: int, like: TrainState | None = None) -> tuple[Any, dict[str, Any]]:
    items = {'state': ocp.args.StandardRestore(like), 'rest': ocp.args.JsonRestore()}
    saved: Any = manager.restore(step, args=ocp.args.Composite(**items))
    state, rest = saved['state'], saved['rest']
    if rest.pop('checksum') != _checksum(state, rest):
        raise ValueError('its checksum is another')
    return state, rest


def _checksum(state: Any, rest: dict[str, Any]) -> int:
    """Of all leaves in any order: Orbax has checksums for its own records, but none for what is in an array."""
    leaves = sorted(zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state))
    return zlib.crc32(json.dumps([leaves, rest], sort_keys=True).encode())


def _unfinished(folder: Path, manager: ocp.CheckpointManager) -> list[Path]:
    finished = {str(step) for step in manager.all_steps()}
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in finished)


def _check_shapes(saved: Any, like: TrainState) -> None:
    shapes = {name: tuple(leaf.shape) for name, leaf in _named(saved)}
    wanted = {name: leaf.shape for name, leaf in _named(like)}
    # The centers first, since they are what people know.
    for name in sorted(shapes | wanted, key=lambda name: (not name.startswith('params/centers'), name)):
        if shapes.get(name) != wanted.get(name):
            raise RunError(f'the saved {name} are {_shown(shapes, name)}, but here {_shown(wanted, name)}. {RECIPE}')


def _shown(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else 'absent'


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    return ((_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')

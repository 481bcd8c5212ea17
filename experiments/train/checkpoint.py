"""Saves of a run by Orbax. A resumed run continues bit for bit.

A save holds one host copy of the parameters, the centers, the state of the optimizer and the step. Any number of
devices can restore it. It also holds the position in the data, the sums over the current epoch, the metrics of the
finished epochs, the arm and the seed.
"""

import contextlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.launch import processes
from experiments.launch.atomic_files import sync, sync_tree
from experiments.launch.errors import RunError
from experiments.launch.mesh import Devices
from experiments.launch.stopping import Stop
from experiments.train.save_files import (
    check_readable,
    check_system,
    first_line,
    hide_abandoned_reads,
    move_aside,
    saved_steps,
    system_reason,
    unfinished_saves,
)
from experiments.train.step import Tally, TrainState

KEPT = 2

# Several processes save at the same step. They synchronize only every so many steps, since that waits for the devices.
AGREE_EVERY = 16

RECIPE = (
    'To keep the network and train new centers, use train.checkpoint.keep_network as experiments/README.md shows; '
    'or pass another --out'
)


class Checkpoints:
    """Saves one arm into its own folder every `every` seconds. Use it in a `with` statement."""

    def __init__(self, folder: Path, every: float, stop: Stop, devices: Devices, *, arm: str, seed: int):
        self._folder = folder
        self._identity = {'arm': arm, 'seed': seed}
        self.rows: list[dict[str, Any]] = []  # the metrics of the finished epochs, which each save holds
        # Orbax calls it before it renames a written save. It removes an older save only after that.
        on_disk = ocp.AsyncOptions(post_finalization_callback=self._sync)
        self._manager = _manager(folder, max_to_keep=KEPT, async_options=on_disk)
        self._every, self._stop, self._devices = every, stop, devices
        self._last, self._calls = time.monotonic(), 0

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._writing() if kind is None else contextlib.suppress(Exception):  # the first error counts
            self._manager.close()
            if processes.is_main_process():
                sync(self._folder)

    def due(self) -> bool:
        """Returns whether to save now: the time has come, or the run was asked to stop."""
        wanted = time.monotonic() - self._last >= self._every
        if processes.several():
            self._calls += 1
            if self._calls % AGREE_EVERY:
                return False
            (wanted,) = self._stop.synchronize(wanted)
        return self._stop.requested or bool(wanted)

    def save(self, state: TrainState, batches: grain.DatasetIterator | None, tally: Tally) -> None:
        """Saves in the background. If the run was asked to stop, waits for the save and raises Stopped.

        `batches` is None where the step makes its batches.
        """
        host = self._devices.fetch(state)
        position = None if batches is None else batches.get_state()
        rest = {'position': position, 'tally': tally, 'rows': self.rows, **self._identity}
        items = {
            'state': ocp.args.StandardSave(_stored(host)),
            'rest': ocp.args.JsonSave({**rest, 'checksum': _checksum(host, rest)}),
        }
        with self._writing():
            self._manager.save(int(host.step), args=ocp.args.Composite(**items), force=True)
            self._last = time.monotonic()
            if self._stop.requested:
                self._manager.wait_until_finished()
        self._stop.raise_if_requested()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises RunError for an error of a save, including a save in the background."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types for a full disk
            raise RunError(
                f'no save could be written to {self._folder} ({system_reason(error)}); the earlier saves are '
                'complete. Correct the error, and run the same command again with --resume'
            ) from error

    def _sync(self) -> None:
        """Syncs the save that process 0 has written to disk."""
        if processes.is_main_process():
            for path in unfinished_saves(self._folder):
                sync_tree(path)

    def restore(
        self, like: TrainState, batches: grain.DatasetIterator | None, tell: Callable[[str], None]
    ) -> tuple[TrainState, Tally] | None:
        """Restores the newest save that is not damaged, and sets `batches` to its position. Returns None without one.

        Moves newer saves that are damaged aside, with a line for each.

        Raises:
          RunError: if a save does not fit `like`, or if the system fails to read one. No save is moved then.
        """
        for path in unfinished_saves(self._folder) if processes.is_main_process() else ():
            tell(f'{path} is unfinished; it is left out')
            shutil.rmtree(path)
        processes.barrier('unfinished saves are gone')
        for step in saved_steps(self._folder):
            path, found, error = self._folder / str(step), None, None
            try:
                check_readable(path)
                shapes = self._manager.item_metadata(step)['state']
                if shapes is None:
                    raise ValueError('it lacks the metadata of its arrays')
                _check_shapes(shapes, like)
                found = _read(self._manager, step, _stored(like))
            except RunError:
                raise
            except Exception as caught:  # Orbax and TensorStore raise many types for a damaged file
                check_system(path, caught)
                error = caught
            if any(processes.largest(found is None)):
                reason = first_line(error) if error else 'another process could not read it'
                if processes.is_main_process():
                    aside = move_aside(path)
                    tell(f'{path} is damaged; it is left out and now {aside.name} ({reason})')
                processes.barrier('a damaged save is aside')
                self._manager.reload()
                continue
            assert found is not None
            fields, rest = found
            _check_identity(path, rest, self._identity)
            if batches is not None:
                batches.set_state(rest['position'])
            self.rows = rest['rows']
            return like.replace(**fields), Tally(*rest['tally'])
        return None


def newest(folder: Path) -> int:
    """Returns the last step that any arm has saved, or 0. `folder` holds one folder for each arm."""
    return max((int(path.name) for path in folder.glob('*/*') if path.name.isdecimal()), default=0)


def saved_params(folder: Path | str, arm: str = '') -> dict[str, Any]:
    """Returns the parameters and centers of the newest save of an arm, `{'params': ..., 'centers': ...}`, in NumPy.

    Raises the errors of `saved_state`.
    """
    return saved_state(folder, arm)['params']


def saved_state(folder: Path | str, arm: str = '') -> dict[str, Any]:
    """Returns the fields of the newest save of an arm, such as `params`, in NumPy.

    Raises:
      RunError: if there is no save, if it is damaged, or if it is not one of `arm`, where that is given.
    """
    with _manager(Path(folder), read_only=True, create=False, save_interval_steps=0) as manager:
        step = next(iter(saved_steps(Path(folder))), None)
        if step is None:
            raise RunError(f'{folder} holds no save; name a folder such as runs/toy2d/checkpoints/center')
        path = Path(folder) / str(step)
        try:
            check_readable(path)
            state, rest = _read(manager, step)
            if arm:
                _check_identity(path, rest, {'arm': arm})
            return state
        except RunError:
            raise
        except Exception as error:
            check_system(path, error)
            raise RunError(
                f'{path} is damaged ({first_line(error)}); remove report.html of its run and '
                'resume the run with --resume, which writes the save again'
            ) from error


def keep_network(params: Any, saved: Any) -> Any:
    """Returns `params` with each array replaced by the `saved` one of the same name and shape, if there is one."""
    old = {(name, leaf.shape): leaf for name, leaf in _named(saved)}
    return jax.tree_util.tree_map_with_path(lambda path, new: old.get((_name(path), new.shape), new), params)


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    hide_abandoned_reads()
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax logs, with a traceback, what it raises too
    handlers = {'state': ocp.StandardCheckpointHandler(), 'rest': ocp.JsonCheckpointHandler()}
    # Orbax takes absolute paths only.
    return ocp.CheckpointManager(
        folder.absolute(), item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def _stored(state: TrainState) -> dict[str, Any]:
    """Returns the fields of a state that have arrays, as a save holds them."""
    fields = {name: getattr(state, name) for name in ('step', 'params', 'opt_state', 'collections', 'dropout_key')}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _read(manager: ocp.CheckpointManager, step: int, like: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    items = {'state': ocp.args.StandardRestore(like), 'rest': ocp.args.JsonRestore()}
    saved: Any = manager.restore(step, args=ocp.args.Composite(**items))
    state, rest = saved['state'], saved['rest']
    if rest.pop('checksum') != _checksum(state, rest):
        raise ValueError('its checksum does not match')
    return state, rest


def _check_identity(path: Path, rest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if missing := [name for name in (*wanted, 'rows') if name not in rest]:
        raise RunError(
            f'{path} was saved by an earlier version, without {", ".join(missing)}; finish the run with that version, '
            'or pass --overwrite to start it anew'
        )
    for name, value in wanted.items():
        if rest[name] != value:
            raise RunError(
                f'{path} is a save of {name} {rest[name]}, but here {name} is {value}; move it back to its own folder'
            )


def _checksum(state: Any, rest: dict[str, Any]) -> int:
    """Returns a checksum of all leaves. Orbax has checksums for its own records, but none for the content of arrays."""
    leaves = sorted(zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state))
    return zlib.crc32(json.dumps([leaves, rest], sort_keys=True).encode())


def _check_shapes(saved: Any, like: TrainState) -> None:
    shapes = {name: tuple(leaf.shape) for name, leaf in _named(saved)}
    wanted = {name: leaf.shape for name, leaf in _named(like)}
    # The centers come first, since users know their shape.
    for name in sorted(shapes | wanted, key=lambda name: (not name.startswith('params/centers'), name)):
        if shapes.get(name) != wanted.get(name):
            raise RunError(f'the saved {name} are {_shown(shapes, name)}, but here {_shown(wanted, name)}. {RECIPE}')


def _shown(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else 'absent'


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    return ((_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')

"""Saves of a run by Orbax: all that its next step depends on, so that it goes on as if it had never stopped.

A save holds the parameters, the centers, the optimizer's state and the step, as one copy on the host: it knows
nothing of devices and can be read back on any number of them. Beside them are the position in the data and the
sums over the part of the epoch that is done. Nothing else is random or remembered.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from experiments.launch import processes
from experiments.launch.atomic_files import sync, sync_tree
from experiments.launch.mesh import Devices
from experiments.launch.run_folder import RunError
from experiments.launch.stopping import Stop
from experiments.train.step import Tally

KEPT = 2

# What Orbax names the folder of a save that it has not finished; older releases add the time.
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp(-\d+)?')

# How TensorStore tells the number of an error of the system.
OS_ERROR = re.compile(r"\[OS error (\d+)|os_error_code='(\d+)'")

# Several processes must save at the same step. To agree on it each time would make them wait for their devices.
AGREE_EVERY = 16

RECIPE = (
    'To keep the network and train new centers, use train.checkpoint.keep_network as experiments/README.md shows; '
    'or pass another --out'
)


class Checkpoints:
    """The saves of one arm in a folder of their own, `every` so many seconds. Use it in a `with` statement."""

    def __init__(self, folder: Path, every: float, stop: Stop, devices: Devices, *, arm: str, seed: int):
        self._folder = folder
        self._whose = {'arm': arm, 'seed': seed}
        self.rows: list[dict[str, Any]] = []  # the metrics of the epochs that are done, saved too
        # Orbax calls it before it renames a save that it has written; only then does it remove an older one.
        on_disk = ocp.AsyncOptions(post_finalization_callback=self._sync)
        self._manager = _manager(folder, max_to_keep=KEPT, async_options=on_disk)
        self._every, self._stop, self._devices = every, stop, devices
        self._last, self._calls = time.monotonic(), 0

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with self._writing() if kind is None else contextlib.suppress(Exception):  # of two errors the first one counts
            self._manager.close()
            if processes.is_main_process():
                sync(self._folder)

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
        rest = {'position': batches.get_state(), 'tally': tally, 'rows': self.rows, **self._whose}
        items = {
            'state': ocp.args.StandardSave(host),
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
        """Turns an error of a save, this one or one in the background, into a line."""
        try:
            yield
        except Exception as error:  # whatever Orbax, or what is below it, makes of a full disk
            raise RunError(
                f'no save could be written to {self._folder} ({_system_reason(error)}); those before it are whole. '
                'Mend that, and give the same line again with --resume'
            ) from error

    def _sync(self) -> None:
        """Waits until a save is on the disk. Process 0 has written it."""
        if processes.is_main_process():
            for path in _unfinished(self._folder):
                sync_tree(path)

    def restore(
        self, like: TrainState, batches: grain.DatasetIterator, tell: Callable[[str], None]
    ) -> tuple[TrainState, Tally] | None:
        """Returns the newest save that is whole, or None; `batches` go on from there.

        Names the damaged saves after it and moves them aside.

        Raises:
          RunError: if a save does not fit `like`, or if the system fails to read one. Every save stays in place then.
        """
        for path in _unfinished(self._folder) if processes.is_main_process() else ():
            tell(f'{path} is unfinished; it is left out')
            shutil.rmtree(path)
        processes.barrier('unfinished saves are gone')
        for step in _steps(self._folder):
            path, found, error = self._folder / str(step), None, None
            try:
                _check_readable(path)
                shapes = self._manager.item_metadata(step)['state']
                if shapes is None:
                    raise ValueError('it lacks the metadata of its arrays')
                _check_shapes(shapes, like)
                found = _read(self._manager, step, like)
            except RunError:
                raise
            except Exception as caught:  # whatever a damaged file leads to, in Orbax or in what is below it
                _check_system(path, caught)
                error = caught
            if any(processes.largest(found is None)):
                reason = _reason(error) if error else 'another process could not read it'
                if processes.is_main_process():
                    aside = _move_aside(path)
                    tell(f'{path} is damaged; it is left out and now {aside.name} ({reason})')
                processes.barrier('a damaged save is aside')
                self._manager.reload()
                continue
            assert found is not None
            state, rest = found
            _check_whose(path, rest, self._whose)
            batches.set_state(rest['position'])
            self.rows = rest['rows']
            return state, Tally(*rest['tally'])
        return None


def newest(folder: Path) -> int:
    """The last step that any arm has saved, 0 if none has; `folder` holds a folder for each."""
    return max((int(path.name) for path in folder.glob('*/*') if path.name.isdecimal()), default=0)


def saved_params(folder: Path | str, arm: str = '') -> dict[str, Any]:
    """Parameters and centers of the newest save in a folder of one arm, `{'params': ..., 'centers': ...}`, in NumPy.

    If `arm` is given, the save must be of that arm.
    """
    with _manager(Path(folder), read_only=True, create=False, save_interval_steps=0) as manager:
        step = next(iter(_steps(Path(folder))), None)
        if step is None:
            raise RunError(f'{folder} holds no save; name a folder such as runs/toy2d/checkpoints/center')
        path = Path(folder) / str(step)
        try:
            _check_readable(path)
            state, rest = _read(manager, step)
            if arm:
                _check_whose(path, rest, {'arm': arm})
            return state['params']
        except RunError:
            raise
        except Exception as error:
            _check_system(path, error)
            raise RunError(
                f'{path} is damaged ({_reason(error)}); remove report.html of its run and give '
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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _system_reason(error: BaseException) -> str:
    """Returns what the system said where one of the causes tells it. TensorStore passes it on as text."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if code := OS_ERROR.search(str(cause)):
            return os.strerror(int(code[1] or code[2]))
    return _reason(error)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    _forget_abandoned_reads()
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax logs, with a traceback, what it raises too
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


def _check_whose(path: Path, rest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
    """Of all leaves in any order: Orbax has checksums for its own records, but none for what is in an array."""
    leaves = sorted(zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state))
    return zlib.crc32(json.dumps([leaves, rest], sort_keys=True).encode())


def _unfinished(folder: Path) -> list[Path]:
    """Returns the folders that Orbax writes a save to before it renames them; other files may be anyone's."""
    paths = _listed(folder)
    return [path for path in paths if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _steps(folder: Path) -> list[int]:
    """Returns the steps that have a save, the newest first. Orbax has none where it fails to list the folder."""
    paths = [path for path in _listed(folder) if path.name.isdecimal() and path.name == str(int(path.name))]
    for path in paths:
        if path.is_symlink() or not path.is_dir():
            raise RunError(f'{path} has the name of a save, but is a link or a file; move it out of the folder')
    return sorted((int(path.name) for path in paths), reverse=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _check_readable(path: Path) -> None:
    """Raises RunError if the system fails to read a file of a save. Orbax may take that for a missing file."""
    if path.is_dir():
        for entry in _listed(path):
            _check_readable(entry)
        return
    try:
        with path.open('rb') as file:
            while file.read(2**20):
                pass
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_system(save: Path, error: BaseException | None) -> None:
    """Raises RunError if it was the system that failed while Orbax read a save, not the save that is damaged."""
    absent = FileNotFoundError, IsADirectoryError, NotADirectoryError
    for cause in _causes(error):
        failed = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and not isinstance(cause, absent))
        if failed or OS_ERROR.search(str(cause)):
            raise _unreadable(save, cause) from error
    _check_readable(save)


def _unreadable(path: Path, error: BaseException) -> RunError:
    return RunError(
        f'{path} could not be read ({_system_reason(error)}); nothing is removed. Mend that, or move '
        'the save to another folder, and give the same line again'
    )


def _move_aside(save: Path) -> Path:
    """Renames a damaged save, so that its step can be saved again, and returns the new path."""
    names = (f'{save.name}.damaged{number or ""}' for number in itertools.count())
    aside = next(path for name in names if not os.path.lexists(path := save.with_name(name)))
    return save.rename(aside)


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

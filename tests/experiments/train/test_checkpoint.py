"""Runs that are stopped, killed, extended or moved to other devices end as one that was left alone."""

import errno
import gc
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc  # noqa: F401  # Python imports it to report a warning, and cannot at a limit on open files
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

from experiments import toy2d
from experiments.data.batches import train_batches
from experiments.data.splits import Split
from experiments.launch.errors import DamagedError, RunError
from experiments.launch.mesh import Devices, choose, over_mesh
from experiments.launch.run_folder import is_whole, read_json
from experiments.launch.stopping import Stop
from experiments.train import checkpoint
from experiments.train.checkpoint import Checkpoints
from experiments.train.logging import Progress
from experiments.train.loop import train_epoch
from experiments.train.model import Classifier
from experiments.train.snapshots import load_snapshot
from experiments.train.step import Metrics, Tally, create_state, train_step
from tests.support import tiny
from tests.support.cases import some_by_default
from tests.support.ends import ARMS, assert_same_ends, what_came_out
from tests.support.limits import limited_to
from tests.support.tiny import QUICK

STEPS = 3  # an epoch of the digits has at this batch size


run = partial(tiny.run, toy2d)


def interrupt_at(monkeypatch, before: int, step: int, signum: int) -> None:
    """Sends the process a signal where the progress bar is told of a step, in whichever arm comes there first."""
    report = Progress.report

    def interrupting(self, done_before, done, *rest):
        if (done_before, done) == (before, step):
            signal.raise_signal(signum)
        report(self, done_before, done, *rest)

    monkeypatch.setattr(Progress, 'report', interrupting)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_both_arms_says_how_to_go_on_and_ends_as_if_it_had_not(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = Path('a run') / 'of mine'
    flags = (*QUICK, '--epochs', 2, '--out', out)
    # The softmax arm has been trained for its first epoch when the second signal comes there, in the center arm.
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 0, STEPS, signum)
            assert run(*flags) == code
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        command = shlex.split(said[0].partition('To continue: ')[2])
        assert command[:3] == ['python', '-m', 'experiments.toy2d']
        flags = command[3:]
        assert '--resume' in flags
        assert not (out / 'report.html').exists()
    assert run(*flags) == 0
    assert_same_ends(out, whole)


@pytest.mark.slow
def test_a_run_that_is_given_more_epochs_ends_as_if_it_had_had_them_at_once(whole, tmp_path):
    flags = (*QUICK, '--out', tmp_path / 'run', '--resume', '--tensorboard')
    assert run(*flags, '--epochs', 1) == 0  # and a run without a save is started
    assert run(*flags, '--epochs', 2, '--profile', '--save-every', 0) == 0
    assert_same_ends(tmp_path / 'run', whole)
    assert len(list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))) == 1

    for arm in ARMS:
        scalars = events(tmp_path / 'run' / 'tensorboard' / arm)
        assert [epoch for name, epoch, _ in scalars if name == 'softmax_loss'] == [1, 2]
        rows = [row for row in what_came_out(whole)['rows'] if row['arm'] == arm]
        for name in MEASURES:
            values = [value for tag, _, value in scalars if tag == name]
            np.testing.assert_allclose(values, [float(row[name]) for row in rows], rtol=1e-6)
        assert {name for name, *_ in scalars} > MEASURES | {'steps_per_second'}


MEASURES = {
    *('softmax_loss', 'center_loss', 'train_accuracy', 'test_accuracy', 'intra_inter_ratio'),
    *('gradient_norm', 'center_step_norm', 'rows_dropped'),
}


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Name, epoch and value of all scalars in TensorBoard's event files: records of length, CRC, bytes, CRC."""
    found = []
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_last_digit(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])  # of the last number: the line end has two


DAMAGES = [
    ('metrics.csv', lose_the_last_digit),
    ('metrics.csv', Path.unlink),
    ('metrics.csv', halve),
    ('summary.json', Path.unlink),
    ('known.json', halve),
    ('features.png', halve),
    ('features.gif', Path.unlink),
]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'damage'), DAMAGES)
def test_a_lost_or_damaged_file_of_a_run_is_not_whole(whole, tmp_path, name, damage):
    path = Path(shutil.copy(whole / name, tmp_path))
    assert is_whole(path)
    damage(path)
    assert not is_whole(path)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'damage'), DAMAGES)
def test_what_a_finished_run_lacks_is_made_again(whole, tmp_path, capsys, name, damage):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    damage(out / name)
    capsys.readouterr()
    assert run(*QUICK, '--epochs', 2, '--out', out, '--resume') == 0
    assert 'the run is finished' not in capsys.readouterr().out
    assert_same_ends(out, whole)
    assert json.loads((out / 'known.json').read_text()) == json.loads((whole / 'known.json').read_text())


LOCKED = """
import sys
from pathlib import Path
from experiments.launch.atomic_files import lock

with lock(Path(sys.argv[1], '.lock')):
    print('locked', flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_run_on_a_folder_in_use_is_one_line_until_the_other_is_killed(tmp_path, capsys):
    out = tmp_path / 'run'
    out.mkdir()
    (out / '.lock').touch()
    command = [sys.executable, '-c', LOCKED, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b'locked\n'
        for flags in (('--resume',), ('--overwrite',), ()):
            assert run(*QUICK, '--epochs', 1, '--out', out, *flags) == 2
            error = capsys.readouterr().err
            assert 'in use by another run' in error
            assert len(error.splitlines()) == 1
            assert os.listdir(out) == ['.lock']
        other.kill()
    assert run(*QUICK, '--epochs', 1, '--out', out) == 0


@pytest.mark.slow
def test_a_run_of_p_by_k_batches_that_goes_on_within_an_epoch_ends_as_if_it_had_not_stopped(tmp_path, capsys):
    out, end = tmp_path / 'run', 2 * STEPS
    flags = (*QUICK, '--images-per-class', 50, '--epochs', 2, '--save-every', 0, '--out', out)
    assert run(*flags) == 0
    shutil.copytree(out, tmp_path / 'whole')
    for arm in ARMS:
        shutil.rmtree(out / 'checkpoints' / arm / str(end))  # the save before is of the last step but one
    (out / 'report.html').unlink()
    assert run(*flags, '--resume') == 0
    assert f'the center arm continues after 1 epochs and {STEPS - 1} steps' in capsys.readouterr().out
    assert_same_ends(out, tmp_path / 'whole')


@pytest.mark.slow
def test_a_run_of_a_version_without_p_by_k_batches_is_one_without_them(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    settings = json.loads((out / 'config.json').read_text())
    del settings['images_per_class']
    (out / 'config.json').write_text(json.dumps(settings))
    assert run(*QUICK, '--epochs', 3, '--out', out, '--resume', '--images-per-class', 50) == 2
    assert '--resume: images-per-class is 50, but' in capsys.readouterr().err
    assert run(*QUICK, '--epochs', 2, '--out', out, '--resume') == 0
    assert 'finished' in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob('*')}
    assert run(*QUICK, '--epochs', 2, '--out', whole, '--resume') == 0
    assert 'finished' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob('*')} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (('--alpha', 0.25), ('alpha', '0.25', '0.5')),
        (('--seed', 3), ('seed', '3', '0')),
        (('--batch-size', 250), ('batch-size', '250', '500')),
        (('--images-per-class', 50), ('images-per-class', '50', '0')),
        (('--learning-rate', 0.5), ('learning-rate', '0.5', '0.003')),
        (('--model', 'lenets++'), ('small', 'lenets++', 'keep_network')),
        (('--feature-dim', 3), ('[10, 2]', '[10, 3]', 'keep_network')),
        (('--epochs', 1), ('--epochs is 1',)),
        (('--overwrite',), ('--resume', '--overwrite')),
    ],
)
def test_a_setting_that_is_not_the_runs_is_one_line_that_names_both_and_exit_code_2(
    whole, tmp_path, capsys, flags, named
):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file() and path.name != 'config.json'}
    assert run(*QUICK, '--epochs', 2, '--out', out, '--resume', *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in named)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_dataset_of_other_classes_is_one_line_that_names_both_shapes(whole, tmp_path, capsys):
    tiny.prepare(tmp_path, {'train': tiny.examples(6), 'test': tiny.examples(3)})
    capsys.readouterr()
    flags = ('--dataset', 'mnist', '--data-dir', tmp_path, '--epochs', 2, '--out', whole, '--resume')
    assert run(*QUICK, *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ('[10, 2]', '[3, 2]', 'keep_network'))


def rename_a_class(folder: Path) -> None:
    (folder / 'ant').rename(folder / 'zebra')


def replace_a_picture(folder: Path) -> None:
    Image.new('L', (8, 8), 99).save(folder / 'bee' / '0.png')


def add_a_picture(folder: Path) -> None:
    Image.new('L', (8, 8), 99).save(folder / 'cow' / 'new.png')


@pytest.fixture(scope='module')
def own_images(tmp_path_factory) -> Path:
    """A folder with images in `moved`, their prepared copy in `cache`, and a run that has seen two epochs of them."""
    folder = tmp_path_factory.mktemp('own images')
    for value, name in enumerate(('ant', 'bee', 'cow')):
        (folder / 'own' / name).mkdir(parents=True)
        for number in range(5):
            Image.new('L', (8, 8), 50 * value + number).save(folder / 'own' / name / f'{number}.png')
    (folder / 'cache').mkdir()
    flags = ('--parallel', 'none', '--data-dir', folder / 'cache', '--out', folder / 'run', '--resume')
    assert run(*flags, '--dataset', folder / 'own', '--epochs', 1) == 0
    moved = (folder / 'own').rename(folder / 'moved')
    assert run(*flags, '--dataset', moved, '--epochs', 2) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (rename_a_class, ('class 0 is bee', 'was ant')),
        (replace_a_picture, ('images of class bee',)),
        (add_a_picture, ('train-examples is 13', 'has 12')),
    ],
)
def test_other_data_are_one_line_that_names_the_difference_and_a_moved_folder_is_none(
    own_images, tmp_path, capsys, change, named
):
    shutil.copytree(own_images, tmp_path, dirs_exist_ok=True)
    before = bytes_of(tmp_path / 'run')
    change(tmp_path / 'moved')
    capsys.readouterr()
    flags = ('--parallel', 'none', '--data-dir', tmp_path / 'cache', '--out', tmp_path / 'run', '--resume')
    assert run(*flags, '--dataset', tmp_path / 'moved', '--epochs', 3) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert '--resume' in error
    assert all(word in error for word in named)
    assert bytes_of(tmp_path / 'run') == before


@pytest.mark.slow
def test_metrics_of_another_version_are_one_line_and_nothing_is_removed(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    *_, column = Metrics._fields
    (out / 'metrics.csv').write_text((whole / 'metrics.csv').read_text().replace(column, 'an_older_name'))
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    assert run(*QUICK, '--epochs', 3, '--out', out, '--resume') == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ('metrics.csv', column, '--out', '--overwrite'))
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == before


SPLIT = Split(
    np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8), np.arange(30, dtype=np.int32) % 10
)


OF = {'arm': 'center', 'seed': 0}


def state_of(devices: Devices, num_classes: int = 10, feature_dim: int = 2) -> Any:
    """A state that has made a step, so that no leaf is 0 throughout, as it is on the devices."""
    model = Classifier('small', feature_dim, num_classes)
    return create_state(model, SPLIT.images.shape[1:], 0, 1e-3, 0.5, devices)


def after_a_step(state: Any, devices: Devices) -> Any:
    batch = devices.place_batch(SPLIT.images, SPLIT.labels)
    return devices.compile(train_step)(state, *batch, devices.place_state(np.float32(0.1)))[0]


@pytest.fixture(scope='module')
def one_device() -> Devices:
    return choose('none')


@pytest.fixture(scope='module')
def saved(one_device) -> Any:
    """A state on the host, after its first step."""
    return one_device.fetch(after_a_step(state_of(one_device), one_device))


def save_twice(folder: Path, state: Any, devices: Devices) -> None:
    """Saves a state as that of step 1 and, with other numbers, as that of step 2."""
    batches = train_batches(SPLIT, 10, 0)
    with Stop('') as stop, Checkpoints(folder, 60, stop, devices, **OF) as saves:
        for step in (1, 2):
            next(batches)
            later = jax.tree.map(partial(np.multiply, step), state).replace(step=np.asarray(step, np.int32))
            saves.save(later, batches, Tally(step, 0.5, 10 * step, [0.1 * step] * 6, step))


def restore(folder: Path, like: Any, devices: Devices) -> tuple[Any, list[str]]:
    """What is restored, or None, with the position in the data behind it; and what is said."""
    said = []
    batches = train_batches(SPLIT, 10, 0)
    with Stop('') as stop, Checkpoints(folder, 60, stop, devices, **OF) as saves:
        found = saves.restore(like, batches, said.append)
    return found and (*found, batches.get_state()['next_index']), said


def assert_same_state(state: Any, expected: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


def test_the_latest_save_is_restored_with_all_that_it_held(tmp_path, saved, one_device):
    folder = tmp_path / 'saves'
    assert restore(folder, saved, one_device) == (None, [])
    save_twice(folder, saved, one_device)
    found, said = restore(folder, saved, one_device)
    assert said == []
    state, tally, position = found
    assert_same_state(state.params, jax.tree.map(lambda a: 2 * a, saved.params))
    assert tally == Tally(2, 0.5, 20, [0.2] * 6, 2)
    assert position == 2


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, saved, one_device, monkeypatch):
    fsync, synced = os.fsync, []

    def record(number: int) -> None:
        synced.append(os.readlink(f'/proc/self/fd/{number}'))
        fsync(number)

    monkeypatch.setattr(os, 'fsync', record)
    save_twice(tmp_path, saved, one_device)
    assert synced[-1] == str(tmp_path)
    needed = [path for path in tmp_path.rglob('*') if path.name != 'commit_success.txt']
    assert len(needed) > 20
    assert {path.replace('.orbax-checkpoint-tmp', '') for path in synced} >= set(map(str, needed))
    assert all('.orbax-checkpoint-tmp' in path for path in synced if path != str(tmp_path))


@pytest.mark.parametrize(('name', 'value'), [('arm', 'softmax'), ('seed', 1)])
def test_a_save_of_another_arm_or_seed_is_one_line(tmp_path, saved, one_device, name, value):
    save_twice(tmp_path, saved, one_device)
    before = bytes_of(tmp_path)
    with Stop('') as stop, Checkpoints(tmp_path, 60, stop, one_device, **(OF | {name: value})) as saves:
        with pytest.raises(RunError, match=rf'2 is a save of {name} {OF[name]}, but here {name} is {value}'):
            saves.restore(saved, train_batches(SPLIT, 10, 0), print)
        assert bytes_of(tmp_path) == before
    with pytest.raises(RunError, match='save of arm center, but here arm is softmax'):
        checkpoint.saved_params(tmp_path, 'softmax')


def forget(folder: Path, names: set[str]) -> None:
    """Makes each save one that has never held these entries."""
    for save in folder.iterdir():
        state = ocp.StandardCheckpointer().restore(save.absolute() / 'state')
        path = save / 'rest' / 'metadata'
        rest = json.loads(path.read_text())
        rest = {name: value for name, value in rest.items() if name not in {*names, 'checksum'}}
        path.write_text(json.dumps({**rest, 'checksum': checkpoint._checksum(state, rest)}))


def test_a_save_of_an_earlier_version_is_one_line_and_stays(tmp_path, saved, one_device):
    save_twice(tmp_path, saved, one_device)
    forget(tmp_path, {'arm', 'seed', 'rows'})
    before = bytes_of(tmp_path)
    for read in (partial(restore, tmp_path, saved, one_device), partial(checkpoint.saved_params, tmp_path, 'center')):
        with pytest.raises(RunError, match='2 was saved by an earlier version') as error:
            read()
        assert '\n' not in str(error.value)
        assert '--overwrite' in str(error.value)
        assert bytes_of(tmp_path) == before


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def cut(save: Path) -> None:
    path = largest(save / 'state')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(save: Path) -> None:
    path = largest(save / 'state')
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(save: Path) -> None:
    for path in save.rglob('*'):
        if path.is_file():
            path.write_bytes(b'')


def lose_the_arrays(save: Path) -> None:
    shutil.rmtree(save / 'state')


def lose_the_metadata(save: Path) -> None:
    (save / 'state' / '_METADATA').unlink()


def lose_a_file(save: Path) -> None:
    largest(save / 'state').unlink()


def lose_the_rest(save: Path) -> None:
    shutil.rmtree(save / 'rest')


def forget_a_step(save: Path) -> None:
    path = save / 'rest' / 'metadata'
    path.write_text(path.read_text().replace('"next_index": 2', '"next_index": 1'))


def leave_unfinished(save: Path) -> None:
    save.rename(save.with_name(f'{save.name}.orbax-checkpoint-tmp'))


def lose_all(save: Path) -> None:
    shutil.rmtree(save)
    save.mkdir()


@pytest.mark.parametrize(
    'damage',
    [
        *(cut, flip, empty, lose_the_arrays, lose_the_metadata, lose_a_file, lose_the_rest, forget_a_step),
        *(leave_unfinished, lose_all),
    ],
)
def test_a_damaged_or_unfinished_latest_save_is_named_and_the_one_before_it_used(tmp_path, saved, one_device, damage):
    folder = tmp_path / 'the saves'
    save_twice(folder, saved, one_device)
    damage(folder / '2')
    found, said = restore(folder, saved, one_device)
    assert len(said) == 1
    assert str(folder / '2') in said[0]
    assert 'damaged' in said[0] or 'unfinished' in said[0]
    state, tally, position = found
    assert_same_state(state.params, saved.params)
    assert (tally.steps, position) == (1, 1)
    # It is gone, so that the run can save that step again.
    save_twice(tmp_path / 'others', saved, one_device)
    shutil.copytree(tmp_path / 'others' / '2', folder / '2')
    found, said = restore(folder, saved, one_device)
    assert (said, found[1].steps) == ([], 2)


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize('name', ['rest/metadata', 'state/_METADATA', 'state/manifest.ocdbt', 'largest'])
def test_an_error_of_the_device_is_one_line_and_leaves_every_save(tmp_path, saved, one_device, name):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)
    path = largest(folder / '2' / 'state') if name == 'largest' else folder / '2' / name
    path.unlink()
    path.symlink_to('/proc/self/mem')  # reading its first bytes is EIO
    before = bytes_of(folder)
    for read in (partial(restore, folder, saved, one_device), partial(checkpoint.saved_params, folder)):
        with pytest.raises(RunError, match='could not be read') as error:
            read()
        message = str(error.value)
        assert str(path) in message
        assert os.strerror(errno.EIO) in message
        assert message.endswith('and run the same command again')
        assert '\n' not in message
        assert bytes_of(folder) == before
    path.unlink()
    path.write_bytes(b'')
    found, _ = restore(folder, saved, one_device)
    assert found[2] == 1


def test_too_many_open_files_leave_every_save(tmp_path, saved, one_device):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)
    before = bytes_of(folder)
    batches, said = train_batches(SPLIT, 10, 0), []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Stop('') as stop, Checkpoints(folder, 60, stop, one_device, **OF) as saves:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(RunError, match='could not be read') as error:
                saves.restore(saved, batches, said.append)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.strerror(errno.EMFILE) in str(error.value)
        assert (said, bytes_of(folder)) == ([], before)
        found = saves.restore(saved, batches, said.append)
    assert found is not None
    assert found[1].steps == 2


def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_the_saves_before(tmp_path, saved, one_device):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)

    def save_more() -> None:
        with limited_to(1000), Stop('') as stop, Checkpoints(folder, 60, stop, one_device, **OF) as saves:
            for step in (3, 4):
                later = saved.replace(step=np.asarray(step, np.int32))
                saves.save(later, train_batches(SPLIT, 10, 0), Tally())

    with pytest.raises(RunError, match=r'no save could be written to .*saves .*too large') as error:
        save_more()
    assert '\n' not in str(error.value)
    assert str(error.value).endswith('and run the same command again with --resume')
    found, _ = restore(folder, saved, one_device)
    assert found[1].steps == 2


@pytest.mark.slow
def test_what_cannot_be_written_is_one_line(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    capsys.readouterr()
    with limited_to(2000):
        assert run(*QUICK, '--epochs', 3, '--out', out, '--resume') != 0
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(out) in error
    assert os.strerror(errno.EFBIG) in error
    assert run(*QUICK, '--epochs', 3, '--out', out, '--resume') == 0


@pytest.mark.slow
def test_a_name_with_brackets_is_printed_as_it_is(whole, tmp_path, capsys):
    out = tmp_path / '[old] [' / 'run] :smile:'
    shutil.copytree(whole, out)
    capsys.readouterr()
    assert run(*QUICK, '--epochs', 2, '--out', out, '--resume') == 0
    assert f'see {out / "report.html"}' in capsys.readouterr().out


# Without a free file Orbax drops coroutines that it has not awaited. They are collected here, not in a later test.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_an_error_of_the_system_in_orbax_leaves_every_save(tmp_path, saved, one_device, monkeypatch):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)
    before = bytes_of(folder)
    batches, said = train_batches(SPLIT, 10, 0), []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    check = checkpoint._check_shapes

    def check_and_use_all_files(*args):
        check(*args)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, limit[1]))

    monkeypatch.setattr(checkpoint, '_check_shapes', check_and_use_all_files)
    with Stop('') as stop, Checkpoints(folder, 60, stop, one_device, **OF) as saves:
        try:
            with pytest.raises(RunError, match='could not be read'):
                saves.restore(saved, batches, said.append)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            gc.collect()
    assert (said, bytes_of(folder)) == ([], before)


def test_damaged_saves_are_moved_aside_whole(tmp_path, saved, one_device):
    folder = tmp_path / 'saves'
    for name in ('2.damaged', '2.damaged1'):
        save_twice(folder, saved, one_device)
        flip(folder / '2')
        before = bytes_of(folder / '2')
        _, said = restore(folder, saved, one_device)
        assert name in said[0]
        assert list(bytes_of(folder / name).values()) == list(before.values())
        shutil.rmtree(folder / '1')


def test_other_files_beside_the_saves_stay(tmp_path, saved, one_device):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'file').write_text('mine')
    shutil.copytree(folder / '2', folder / '2.bak')
    shutil.copytree(folder / '2', folder / '2.orbax-checkpoint-tmp.bak')
    (folder / 'notes').mkdir()
    (folder / 'notes' / 'file').write_text('mine')
    for name in ('link', '7.orbax-checkpoint-tmp'):
        (folder / name).symlink_to(mine)
    (folder / 'broken').symlink_to('nowhere')
    before, names = bytes_of(tmp_path), sorted(os.listdir(folder))
    (folder / '9.orbax-checkpoint-tmp').mkdir()
    found, said = restore(folder, saved, one_device)
    assert (found[1].steps, len(said)) == (2, 1)
    assert (bytes_of(tmp_path), sorted(os.listdir(folder))) == (before, names)


def link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parents[1])


def link_to_nothing(path: Path) -> None:
    path.symlink_to('nowhere')


@pytest.mark.parametrize('make', [link_to_a_folder, link_to_nothing, Path.touch])
def test_a_link_or_file_with_the_name_of_a_save_is_one_line(tmp_path, saved, one_device, make):
    folder = tmp_path / 'saves'
    save_twice(folder, saved, one_device)
    make(folder / '3')
    with pytest.raises(RunError, match='saves/3 has the name of a save'):
        restore(folder, saved, one_device)
    assert os.path.lexists(folder / '3')


def test_a_damaged_snapshot_is_named(tmp_path):
    path = tmp_path / 'center-2.npz'
    path.write_bytes(b'PK')
    with pytest.raises(DamagedError, match=r'center-2\.npz is damaged.*--overwrite'):
        load_snapshot(path)


@pytest.mark.parametrize('read', [load_snapshot, read_json])
def test_an_error_of_the_device_is_not_taken_for_damage(tmp_path, read):
    path = tmp_path / 'file'
    path.symlink_to('/proc/self/mem')  # reading its first bytes is EIO
    with pytest.raises(RunError, match=f'file could not be read .{os.strerror(errno.EIO)}') as error:
        read(path)
    assert not isinstance(error.value, DamagedError)
    assert str(error.value).endswith('and run the same command again')


@pytest.mark.slow
@pytest.mark.parametrize('content', [b'', b'{', b'\xff', b'[]', b'3', b'{}'])
def test_damaged_settings_are_one_line_that_names_the_file_and_the_cure(whole, tmp_path, capsys, content):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    (out / 'config.json').write_bytes(content)
    before = bytes_of(out)
    capsys.readouterr()
    assert run(*QUICK, '--epochs', 2, '--out', out, '--resume') == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert 'config.json is damaged' in error
    assert '--overwrite' in error
    assert bytes_of(out) == before


@pytest.mark.slow
def test_a_run_goes_on_without_the_snapshots_that_are_lost_and_names_them(whole, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(whole, out)
    (out / 'snapshots' / 'softmax-1.npz').unlink()
    halve(out / 'snapshots' / 'center-0.npz')
    capsys.readouterr()
    assert run(*QUICK, '--epochs', 3, '--out', out, '--resume') == 0
    said = capsys.readouterr().out
    assert 'softmax-1.npz is missing; the animation leaves out epoch 1' in said
    assert 'center-0.npz is damaged' in said
    with Image.open(out / 'features.gif') as film:
        assert getattr(film, 'n_frames', 1) == 2


def test_if_no_save_is_whole_each_is_named_and_the_run_starts(tmp_path, saved, one_device):
    save_twice(tmp_path, saved, one_device)
    empty(tmp_path)
    found, said = restore(tmp_path, saved, one_device)
    assert found is None
    assert [str(tmp_path / str(step)) in line for step, line in zip((2, 1), said, strict=True)] == [True, True]


@pytest.mark.parametrize(('num_classes', 'feature_dim'), [(7, 2), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_other_centers_are_an_error_that_names_both_shapes_and_the_recipe_keeps_the_network(
    tmp_path, saved, one_device, num_classes, feature_dim
):
    save_twice(tmp_path, saved, one_device)
    state = state_of(one_device, num_classes, feature_dim)
    with pytest.raises(RunError) as error:
        restore(tmp_path, one_device.fetch(state), one_device)
    message = str(error.value)
    assert '[10, 2]' in message
    assert f'[{num_classes}, {feature_dim}]' in message
    assert 'keep_network' in message
    assert len(message.splitlines()) == 1

    network = checkpoint.saved_params(tmp_path)['params']
    params = {**state.params, 'params': checkpoint.keep_network(state.params['params'], network)}
    trunk = next(name for name in network if name not in ('features', 'logits'))
    jax.tree.map(np.testing.assert_array_equal, params['params'][trunk], network[trunk])
    assert params['params']['logits']['kernel'].shape == (feature_dim, num_classes)
    assert not np.any(params['centers']['center']['centers'])
    moved = after_a_step(state.replace(params=one_device.place_state(params)), one_device)
    assert np.any(moved.params['centers']['center']['centers'])


def some_devices(count: int, **sizes: int) -> Devices:
    return over_mesh(jax.devices()[:count], sizes or {'data': count})


MOVES = {
    'all to 4': (choose('auto'), some_devices(4)),
    '4 to one': (some_devices(4), choose('none')),
    'pmap to 4': (choose('pmap'), some_devices(4)),
    '2 x 4 to 4 shards': (some_devices(8, data=2, classes=4), some_devices(4, classes=4)),
    '4 shards to one': (some_devices(4, classes=4), choose('none')),
    '2 x 4 to pmap': (some_devices(8, data=2, classes=4), choose('pmap')),
}


@pytest.mark.parametrize(('before', 'after'), some_by_default(MOVES, 'pmap to 4', '2 x 4 to 4 shards'))
def test_what_is_saved_on_some_devices_goes_on_on_others(tmp_path, saved, before, after):
    with Stop('') as stop, Checkpoints(tmp_path, 60, stop, before, **OF) as saves:
        saves.save(before.place_state(saved), train_batches(SPLIT, 10, 0), Tally())
    assert checkpoint.saved_params(tmp_path)['centers']['center']['centers'].shape == (10, 2)
    found, _ = restore(tmp_path, after.fetch(state_of(after)), after)
    jax.tree.map(np.testing.assert_array_equal, found[0].params, saved.params)
    jax.tree.map(np.testing.assert_array_equal, found[0].opt_state, saved.opt_state)

    placed = after.place_state(found[0])
    centers = placed.params['centers']['center']['centers']
    sharding = centers.sharding
    assert len(sharding.device_set) == len(after.devices)
    moved = after_a_step(placed, after).params['centers']['center']['centers']
    assert moved.sharding.is_equivalent_to(sharding, moved.ndim)
    if after.mesh is not None:
        shards = after.mesh.shape.get('classes', 1)
        assert {part.data.shape for part in moved.addressable_shards} == {(-(-10 // shards), 2)}


def test_the_loop_refuses_transfers_by_the_way(one_device):
    state, batches = state_of(one_device), train_batches(SPLIT, 10, 0)
    step, unplaced = one_device.compile(train_step), np.float32(0.1)
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        train_epoch(state, step, batches, 3, unplaced, one_device, lambda *_: None)

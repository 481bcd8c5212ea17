"""Files are written whole, and never through a link that somebody put in their place."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.data import digits, tfds_cache
from experiments.launch import atomic_files
from experiments.launch.run_folder import write_json
from experiments.train.snapshots import Snapshot, load_snapshot, save_snapshot
from tests.support.limits import limited_to

SNAPSHOT = Snapshot(
    epoch=1,
    train_features=np.zeros((0, 2), np.float32),
    train_labels=np.zeros(0, np.int32),
    test_features=np.ones((3, 2), np.float32),
    test_labels=np.arange(3, dtype=np.int32),
    centers=np.ones((3, 2), np.float32),
    test_accuracy=1.0,
    nearest_center_accuracy=1.0,
    intra_inter_ratio=0.5,
    collapsed=False,
)


def write_snapshot(path: Path) -> None:
    save_snapshot(path, SNAPSHOT)


def write_config(path: Path) -> None:
    write_json(path, {'seed': 1})


def write_figure(path: Path) -> None:
    atomic_files.save_figure(path, Figure())


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A file that no program here may write to."""
    path = tmp_path / 'theirs'
    path.write_text('theirs')
    return path


@pytest.mark.parametrize('beside', [True, False], ids=['draft', 'file'])
@pytest.mark.parametrize(
    ('name', 'write'),
    [('config.json', write_config), ('center-1.npz', write_snapshot), ('features.png', write_figure)],
)
def test_a_file_is_not_written_through_a_link(tmp_path, theirs, name, write, beside):
    path = tmp_path / name
    (path.with_name(f'.{name}.draft') if beside else path).symlink_to(theirs)
    write(path)
    assert theirs.read_text() == 'theirs'
    assert path.is_file()
    assert not path.is_symlink()


def test_what_is_written_is_read(tmp_path):
    write_config(tmp_path / 'config.json')
    assert json.loads((tmp_path / 'config.json').read_text()) == {'seed': 1}
    write_snapshot(tmp_path / 'center-1.npz')
    np.testing.assert_array_equal(load_snapshot(tmp_path / 'center-1.npz').test_labels, SNAPSHOT.test_labels)
    write_figure(tmp_path / 'features.png')
    assert (tmp_path / 'features.png').read_bytes().startswith(b'\x89PNG')


def test_a_file_stays_whole_where_writing_its_successor_fails(tmp_path):
    path = tmp_path / 'text'
    atomic_files.write_text(path, 'whole')
    with pytest.raises(UnicodeEncodeError):
        atomic_files.write_text(path, 'half \ud800')
    assert path.read_text() == 'whole'


def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe(tmp_path):
    texts = ['=1+1', '+1', '-1', '@x', '\tx', '\rx', 'a=1', '', "'x"]
    atomic_files.write_table(tmp_path / 'table.csv', [{'text': text, 'number': -1.5} for text in texts])
    with (tmp_path / 'table.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['text'] for row in rows] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "'\rx", 'a=1', '', "'x"]
    assert {row['number'] for row in rows} == {'-1.5'}


@pytest.mark.parametrize(
    ('name', 'write'),
    [
        ('config.json', lambda path: write_json(path, 100 * ['x'])),
        ('center-1.npz', write_snapshot),
        ('features.png', write_figure),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name, write):
    with limited_to(100), pytest.raises(OSError, match='too large') as error:
        write(tmp_path / name)
    assert error.value.filename == str(tmp_path / name)


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_config(tmp_path / 'gone' / 'config.json')
    assert error.value.filename == str(tmp_path / 'gone' / 'config.json')


def test_a_lock_neither_empties_its_file_nor_follows_a_link(tmp_path, theirs):
    lock = tmp_path / '.lock'
    lock.write_text('kept')
    with tfds_cache.lock_cache(tmp_path):
        pass
    assert lock.read_text() == 'kept'
    lock.unlink()
    lock.symlink_to(theirs)
    with pytest.raises(OSError, match='symbolic link'), tfds_cache.lock_cache(tmp_path):
        pass
    assert theirs.read_text() == 'theirs'


def test_a_lock_is_held_by_one_and_ends_with_it(tmp_path):
    path = tmp_path / '.lock'
    with atomic_files.lock(path), pytest.raises(BlockingIOError), atomic_files.lock(path, wait=False):
        pass
    with atomic_files.lock(path, wait=False):
        assert os.listdir(tmp_path) == ['.lock']


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The paths that the system is asked to write to the disk, and the renames among them."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(number: int) -> None:
        calls.append(os.readlink(f'/proc/self/fd/{number}'))
        fsync(number)

    def record_replace(old: Path, new: Path) -> None:
        calls.append('rename')
        replace(old, new)

    monkeypatch.setattr(os, 'fsync', record_fsync)
    monkeypatch.setattr(os, 'replace', record_replace)
    return calls


@pytest.mark.parametrize(
    ('name', 'write'),
    [('config.json', write_config), ('center-1.npz', write_snapshot), ('features.png', write_figure)],
)
def test_a_file_is_on_the_disk_before_it_is_in_its_place(tmp_path, synced, name, write):
    write(tmp_path / name)
    assert synced == [str(tmp_path / f'.{name}.draft'), 'rename', str(tmp_path)]


def test_a_prepared_copy_is_on_the_disk(tmp_path, synced):
    builder = digits.digits(tmp_path)
    assert {str(path) for path in Path(builder.data_dir).rglob('*')} < set(synced)

"""A sweep, run whole by real processes: its cells, its pictures, and how it goes on."""

import csv
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import sweep
from experiments.data.load import load
from experiments.data.open_set import divide
from experiments.launch.errors import RunError
from experiments.launch.mesh import choose
from experiments.launch.stopping import Stop
from experiments.train import grid
from experiments.train.grid import Cell, Task, Trainer
from tests.support import tiny
from tests.support.ends import untimed

FLAGS = ('--epochs', 1, '--batch-size', 500, '--feature-dim', 2, '--seeds', 1, '--weights', 0.1, '--alphas', 0.5)


run = partial(tiny.run, sweep)


def table(out: Path) -> list[dict[str, str]]:
    """The rows of a sweep without times."""
    with (out / 'sweep.csv').open(newline='', encoding='utf-8') as file:
        return [{key: v for key, v in row.items() if not key.endswith('_seconds')} for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('whole') / 'a sweep'
    assert run(*FLAGS, '--out', out, '--workers', 1) == 0
    return out


@pytest.mark.slow
def test_a_sweep_has_a_row_for_each_cell_and_softmax_alone_and_pictures(whole):
    rows = table(whole)
    found = {(row['center_weight'], row['alpha'], row['seed']) for row in rows}
    assert found == {('0.0', '0.5', '0'), ('0.1', '0.5', '0')}
    assert len(rows) == 2
    summary: dict[str, Any] = json.loads((whole / 'summary.json').read_text())
    for name, weight in (('softmax', '0.0'), ('weight 0.1, alpha 0.5', '0.1')):
        values = [float(row['verification_accuracy']) for row in rows if row['center_weight'] == weight]
        np.testing.assert_allclose(summary[name]['verification_accuracy']['mean'], np.mean(values))
    for name in ('accuracy.png', 'weights.png'):
        with Image.open(whole / name) as picture:
            assert picture.width > 800
    page = (whole / 'report.html').read_text(encoding='utf-8')
    assert 'python -m experiments.sweep' in page
    assert '--weights 0.1 --alphas 0.5' in page


def test_a_cell_that_the_system_fails_to_read_is_not_done_again(tmp_path):
    cell = Cell(0.1, 0.5, 0, 2)
    cell.path(tmp_path).write_text('[]')
    assert not cell.done(tmp_path)
    cell.path(tmp_path).unlink()
    cell.path(tmp_path).symlink_to('/proc/self/mem')  # reading its first bytes is EIO
    with pytest.raises(RunError, match='could not be read'):
        cell.done(tmp_path)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_and_does_no_cell_twice(whole, tmp_path, capsys):
    out = tmp_path / 'sweep'
    shutil.copytree(whole, out)
    (out / 'report.html').unlink()
    first, *others = sorted((out / 'cells').glob('*.json'))
    first.write_bytes(first.read_bytes()[:20])
    before = {path: path.stat().st_mtime_ns for path in others}
    assert run(*FLAGS, '--out', out, '--resume', '--workers', 1) == 0
    said = capsys.readouterr().out
    assert '1 of 2 cells are done already' in said
    assert f'{first} is damaged' in said.replace('\n', '')
    assert {path: path.stat().st_mtime_ns for path in others} == before
    assert table(out) == table(whole)
    assert run(*FLAGS, '--out', out, '--resume') == 0
    assert 'finished' in capsys.readouterr().out


def test_a_measure_that_cells_of_an_earlier_version_lack_is_nan():
    old = {'center_weight': 0.0, 'alpha': 0.5, 'auc': 0.75, 'collapsed': False}
    first, second = sweep.complete([old, {**old, 'map': 0.5}])
    assert list(first) == list(second) == [*old, 'map']
    assert np.isnan(first.pop('map'))
    assert first == old
    assert second['map'] == 0.5


@pytest.mark.slow
def test_a_sweep_on_a_mesh_has_the_cells_of_one_on_cores(whole, tmp_path):
    assert run(*FLAGS, '--out', tmp_path / 'sweep', '--mesh', 'data=2,classes=4') == 0
    for row, expected in zip(table(tmp_path / 'sweep'), table(whole), strict=True):
        for name, value in row.items():
            if name != 'collapsed':
                np.testing.assert_allclose(float(value), float(expected[name]), rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures('all_optimizations')  # as its processes
def test_workers_train_on_the_data_of_the_sweep_though_an_image_is_added(tmp_path):
    source, folder = tmp_path / 'images', tmp_path / 'cells'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 8, 8), np.uint8)
    for label, number in np.ndindex(4, 10):
        (source / f'{label}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[label, number]).save(source / f'{label}' / f'{number}.png')
    config = sweep.Config(dataset=str(source), data_dir=tmp_path, epochs=1, batch_size=32, held_out='2-3')
    open_set = divide(load(config.dataset, config.data_dir), config.held_out)
    task, cell = Task(config, 'cosine', folder), Cell(0.1, 0.5, 0, 3)
    Trainer(task, open_set, choose('none')).train(cell)
    expected = cell.read(folder)

    Image.fromarray(pixels[0, 0]).save(source / '1' / 'added.png')
    with Stop('') as stop:
        assert list(grid.work_on_cores(task, [cell], open_set, 1, stop)) == [cell]
    assert untimed(cell.read(folder)) == untimed(expected)


def test_workers_beside_other_devices_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert run('--out', tmp_path / 'run', '--workers', 2, '--parallel', 'none') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--workers' in error


@pytest.mark.slow
def test_other_settings_are_another_sweep(whole, tmp_path, capsys):
    out = tmp_path / 'sweep'
    shutil.copytree(whole, out)
    assert run(*FLAGS, '--out', out, '--resume', '--epochs', 2) == 2
    assert 'epochs is 2' in capsys.readouterr().err
    assert run(*FLAGS, '--out', out) == 2
    assert '--overwrite' in capsys.readouterr().err


def test_softmax_alone_and_a_picture_of_two_dimensions_are_cells_of_each_sweep():
    cells = sweep.cells_of(sweep.Config())
    assert len(cells) == len(set(cells)) == 5 + 5 + 4 * 4 * 5
    assert {cell.center_weight for cell in cells if cell.feature_dim == 2} == {0, 0.001, 0.01, 0.1, 1}
    assert len({cell.path(Path()) for cell in cells}) == len(cells)
    assert Cell(0.0, 0.5, 4, 64) in cells


@pytest.mark.parametrize('flag', ['--weights', '--alphas'])
def test_no_value_for_a_list_is_one_line_that_names_it_and_exit_code_2(tmp_path, capsys, flag):
    assert run('--out', tmp_path / 'run', flag) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert flag in error


@pytest.mark.parametrize(
    ('flag', 'value'),
    [('--weights', '-1'), ('--alphas', '2'), ('--seeds', '0'), ('--workers', '-1'), ('--held-out', 'all')],
)
def test_a_wrong_value_is_one_line_that_names_it_and_exit_code_2(tmp_path, capsys, flag, value):
    assert run('--out', tmp_path / 'run', flag, value) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert flag in error


@pytest.mark.slow
def test_a_sweep_that_is_stopped_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    work = grid.work_on_cores

    def interrupted(*args, **kwargs):
        for cell in work(*args, **kwargs):
            yield cell
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(grid, 'work_on_cores', interrupted)
        assert run(*FLAGS, '--out', tmp_path / 'sweep') == 143
    assert 'To continue: python -m experiments.sweep' in capsys.readouterr().err
    assert run(*FLAGS, '--out', tmp_path / 'sweep', '--resume') == 0
    assert table(tmp_path / 'sweep') == table(whole)

"""Runs on the arrays of a .npz file: trained by a small MLP, resumed, and labelled as the run standardizes them."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from experiments import predict, sweep, toy2d, verification
from experiments.data.load import load
from tests.support import tiny
from tests.support.tiny import QUICK

run = partial(tiny.run, toy2d)


@pytest.fixture(scope='module')
def file(tmp_path_factory) -> Path:
    """The digits as rows of 64 numbers of another scale."""
    data = load('digits')
    arrays = {}
    for end, split in (('', data.train), ('_test', data.test)):
        images, arrays[f'y{end}'] = split.take(range(len(split)))
        arrays[f'x{end}'] = 1000 + images.reshape(len(images), -1) / 7
    path = tmp_path_factory.mktemp('data') / 'digits.npz'
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory, file) -> Path:
    out = tmp_path_factory.mktemp('trained') / 'run'
    assert run(*QUICK, '--dataset', file, '--epochs', 4, '--learning-rate', 0.01, '--out', out) == 0
    return out


def predicted(out: Path, *flags: object) -> list[dict[str, str]]:
    assert tiny.run(predict, *flags, '--out', out) == 0
    with (out / 'predictions.csv').open(newline='', encoding='utf-8') as table:
        return list(csv.DictReader(table))


@pytest.mark.slow
def test_an_mlp_learns_the_rows_and_predict_standardizes_as_the_run_did(trained, file, tmp_path):
    summary = json.loads((trained / 'summary.json').read_text())['center']
    assert summary['nearest_center_accuracy'] > 0.5
    rows = predicted(tmp_path / 'split', '--images', f'{file}:test', '--run', trained)
    with np.load(file) as arrays:
        x, y = arrays['x_test'], arrays['y_test']
    right = np.mean([row['nearest'] == str(label) for row, label in zip(rows, y, strict=True)])
    np.testing.assert_allclose(right, summary['nearest_center_accuracy'], rtol=1e-6)
    assert not (tmp_path / 'split' / 'predictions.png').exists()

    np.savez(tmp_path / 'some.npz', x=x[:5])  # whose own mean is another
    some = predicted(tmp_path / 'some', '--images', tmp_path / 'some.npz', '--run', trained)
    assert [row['image'] for row in some] == [f'{tmp_path / "some.npz"}:{number}' for number in range(5)]
    for row, same in zip(some, rows, strict=False):
        np.testing.assert_allclose(float(row['distance']), float(same['distance']), rtol=1e-4)


@pytest.mark.slow
def test_a_moved_file_resumes_the_run_and_other_arrays_are_one_line(trained, file, tmp_path, capsys):
    out, moved = tmp_path / 'run', tmp_path / 'moved.npz'
    shutil.copytree(trained, out)
    shutil.copy(file, moved)
    flags = (*QUICK, '--learning-rate', 0.01, '--out', out, '--resume', '--dataset')
    (out / 'inputs.npz').unlink()
    assert run(*flags, file, '--epochs', 4) == 0
    assert (out / 'inputs.npz').read_bytes() == (trained / 'inputs.npz').read_bytes()
    assert run(*flags, moved, '--epochs', 5) == 0
    with np.load(file) as arrays:
        np.savez(moved, **{**arrays, 'x': arrays['x'] + 1})
    capsys.readouterr()
    assert run(*flags, moved, '--epochs', 6) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--resume: x is float64[1438, 64] with checksum' in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ('images', 'named'),
    [
        ('digits:test', 'was trained on arrays; pass --images file.npz'),
        ('{narrow}', 'has the shape [3]'),
        ('nowhere.npz', 'nowhere.npz does not exist'),
        ('{empty}', 'has no x'),
    ],
)
def test_what_cannot_be_labelled_is_one_line(trained, tmp_path, capsys, images, named):
    np.savez(tmp_path / 'narrow.npz', x=np.ones((4, 3)))
    np.savez(tmp_path / 'empty.npz', z=np.ones((4, 3)))
    images = images.format(narrow=tmp_path / 'narrow.npz', empty=tmp_path / 'empty.npz')
    assert tiny.run(predict, '--images', images, '--run', trained, '--out', tmp_path / 'out') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert named in error
    assert not (tmp_path / 'out').exists()


def test_a_network_for_images_takes_no_arrays(file, tmp_path, capsys):
    assert run('--dataset', file, '--model', 'lenets++', '--out', tmp_path / 'run') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--model lenets++ takes images' in error


@pytest.mark.slow
def test_arrays_are_verified_swept_and_given_to_a_network_of_the_users(file, tmp_path):
    flags = ('--dataset', file, '--epochs', 1, '--batch-size', 500)
    model = ('--model', 'tests.support.networks:Normalized')
    assert tiny.run(verification, *flags, '--seeds', 1, *model, '--out', tmp_path / 'pairs') == 0
    assert (tmp_path / 'pairs' / 'inputs.npz').exists()
    grid = ('--seeds', 1, '--weights', 0.1, '--alphas', 0.5, '--parallel', 'none')
    assert tiny.run(sweep, *flags, *grid, '--out', tmp_path / 'sweep') == 0

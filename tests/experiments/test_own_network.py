"""A network of the user's by --model: trained, resumed, used by predict, and imported for a flag alone."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import predict, sweep, toy2d, verification
from experiments.launch.mesh import Devices, choose, over_mesh
from experiments.train.checkpoint import saved_state
from experiments.train.model import Classifier
from experiments.train.step import create_state, train_step
from tests.support import networks, tiny
from tests.support.tiny import QUICK

MODEL = 'tests.support.networks:Normalized'

run = partial(tiny.run, toy2d)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('trained') / 'run'
    assert run(*QUICK, '--model', MODEL, '--epochs', 2, '--out', out) == 0
    return out


def arrays_of(out: Path) -> dict[str, bytes]:
    found = {}
    for arm in ('softmax', 'center'):
        state = saved_state(out / 'checkpoints' / arm)
        found |= {arm + jax.tree_util.keystr(p): np.asarray(a).tobytes() for p, a in jax.tree.leaves_with_path(state)}
    return found


@pytest.mark.slow
def test_running_statistics_and_dropout_are_resumed_bit_for_bit(trained, tmp_path):
    flags = (*QUICK, '--model', MODEL, '--out', tmp_path / 'run', '--resume')
    assert run(*flags, '--epochs', 1) == 0
    assert run(*flags, '--epochs', 2) == 0
    found, expected = arrays_of(tmp_path / 'run'), arrays_of(trained)
    assert any('batch_stats' in name for name in found)
    assert found == expected
    assert saved_state(trained / 'checkpoints' / 'center')['collections']['counts']['network']['steps'] == 6
    assert (tmp_path / 'run' / 'features.png').read_bytes() == (trained / 'features.png').read_bytes()


@pytest.mark.slow
def test_predict_uses_the_running_statistics(trained, tmp_path):
    flags = ('--images', 'digits:test', '--run', trained, '--model', MODEL)
    assert tiny.run(predict, *flags, '--out', tmp_path) == 0
    lines = (tmp_path / 'predictions.csv').read_text().splitlines()[1:]
    _, labels = tiny.digits_test()
    right = np.mean([line.split(',')[2] == str(label) for line, label in zip(lines, labels, strict=True)])
    summary = json.loads((trained / 'summary.json').read_text())
    np.testing.assert_allclose(right, summary['center']['nearest_center_accuracy'], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('given', [(), ('--model', 'small'), ('--model', 'tests.support.networks:Wide')])
def test_no_run_makes_a_module_be_imported(trained, tmp_path, capsys, monkeypatch, given):
    out = tmp_path / 'run'
    shutil.copytree(trained, out)
    (tmp_path / 'named_by_a_run.py').write_text(f'open({str(tmp_path / "imported")!r}, "w").close()')
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((out / 'config.json').read_text())
    (out / 'config.json').write_text(json.dumps(config | {'model': 'named_by_a_run:Net'}))
    capsys.readouterr()
    assert tiny.run(predict, '--images', 'digits:test', '--run', out, *given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--model named_by_a_run:Net' in error
    assert run(*QUICK, '--epochs', 3, '--out', out, '--resume', *given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert 'named_by_a_run:Net' in error
    assert 'named_by_a_run' not in sys.modules
    assert not (tmp_path / 'imported').exists()


@pytest.mark.parametrize(
    ('model', 'named'),
    [
        ('no_such_module:Net', 'No module named'),
        ('tests.support.networks:Normalised', 'did you mean tests.support.networks:Normalized?'),
        ('tests.support.networks:function', 'no class function that is a flax.linen.Module'),
        ('tests.support.networks:Wide', '(2, 3)'),
        ('tests.support.networks:Unruled', 'needs PRNG for "dropout"'),
        ('tests.support.networks:Unnamed', 'feature_dim'),
        ('tests.support.networks', '--model must be small, lenets++ or package.module:Class'),
        ('./networks:Net', 'package.module:Class'),
        ('broken_module:Net', 'SystemExit'),
    ],
)
def test_a_wrong_name_or_shape_is_one_line_before_anything_is_written(tmp_path, capsys, monkeypatch, model, named):
    (tmp_path / 'broken_module.py').write_text('raise SystemExit(3)')
    monkeypatch.syspath_prepend(tmp_path)
    assert run('--model', model, '--out', tmp_path / 'run') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert model in error
    assert named in error
    assert not (tmp_path / 'run').exists()


def test_a_sweep_takes_no_network_of_the_users(tmp_path, capsys):
    assert tiny.run(sweep, '--model', MODEL, '--out', tmp_path / 'run') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--model of a sweep' in error


def after_a_step(devices: Devices, images: np.ndarray, labels: np.ndarray):
    model = Classifier(networks.Normalized, 2, 3)
    state = create_state(model, images.shape[1:], 0, 1e-3, 0.5, devices)
    batch = devices.place_batch(images, labels)
    return devices.fetch(devices.compile(train_step)(state, *batch, devices.place_state(np.float32(0.1)))[0])


@pytest.mark.parametrize(
    'count', [14, pytest.param(8, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.slow)]
)
def test_running_means_are_averaged_over_the_devices_by_their_examples(count):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int32) % 3
    labels[-1] = -1
    devices = Devices(tuple(jax.devices()[:4]), 'data', None)
    stats = after_a_step(devices, images, labels).collections
    counts = stats['counts']['network']['steps']
    assert (counts.dtype, counts) == (np.int32, 1)

    state = choose('none').fetch(
        create_state(Classifier(networks.Normalized, 2, 3), (4, 4, 1), 0, 1e-3, 0.5, choose('none'))
    )
    dense = state.params['params']['network']['Dense_0']
    padded = -count % 4
    order = np.resize(np.arange(count), count + padded).reshape(4, -1)
    counted = np.append(labels, np.full(padded, -1)).reshape(4, -1) >= 0
    x = (images / 127.5 - 1).reshape(count, -1) @ dense['kernel'].astype(np.float64) + dense['bias']
    means = np.stack([x[shard].mean(axis=0) for shard in order])
    expected = 0.5 * np.average(means, axis=0, weights=counted.sum(axis=1))
    np.testing.assert_allclose(stats['batch_stats']['network']['BatchNorm_0']['mean'], expected, rtol=1e-4, atol=1e-6)


def test_padding_repeats_examples_so_that_it_does_not_shift_the_statistics():
    images = np.full((3, 4, 4, 1), 200, np.uint8)
    labels = np.arange(3, dtype=np.int32)
    mesh = over_mesh(jax.devices()[:4], {'data': 4})
    one, four = (after_a_step(devices, images, labels).collections['batch_stats'] for devices in (choose('none'), mesh))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, four)


@pytest.mark.slow
def test_a_network_of_the_users_is_verified(tmp_path):
    flags = ('--model', MODEL, '--epochs', 1, '--seeds', 1, '--batch-size', 500, '--parallel', 'pmap')
    assert tiny.run(verification, *flags, '--out', tmp_path / 'run') == 0

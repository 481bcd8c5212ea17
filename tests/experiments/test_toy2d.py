"""The main job, run whole: what it writes, its arms, its devices, and what it says to a wrong value."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import toy2d
from tests.support import tiny
from tests.support.tiny import COLUMNS, rows, strict

# Tests with the same batch size and devices share their compiled programs.
FAST = ('--batch-size', 125, '--parallel', 'none')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('data')


run = partial(tiny.run, toy2d)


def short(tmp_path: Path, data_dir: Path, **changes) -> Path:
    """A run of one epoch, for its numbers."""
    out = tmp_path / '-'.join(map(str, changes.values()))
    config = dataclasses.replace(toy2d.Config(), out=out, data_dir=data_dir, epochs=1, batch_size=FAST[1])
    toy2d.main(dataclasses.replace(config, **changes))
    return out


def test_a_run_writes_its_settings_its_numbers_and_its_pictures(tmp_path, data_dir, capsys):
    out = tmp_path / 'a folder' / 'run'
    assert run('--epochs', 2, *FAST, '--out', out, '--data-dir', data_dir) == 0

    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert all(name in first for name in ('1 x cpu', 'jax', 'flax', 'optax'))
    assert 'steps/s' in printed
    assert 'intra/inter' in printed

    config = strict(out / 'config.json')
    assert config['epochs'] == 2
    assert config['devices'] == '1 x cpu'
    assert set(config['versions']) == {'python', 'centerloss_jax', 'jax', 'flax', 'optax'}

    metrics = rows(out)
    assert set(metrics[0]) >= COLUMNS
    assert [(row['arm'], row['epoch']) for row in metrics] == [
        (arm, epoch) for arm in ('softmax', 'center') for epoch in ('1', '2')
    ]
    assert all(float(row['center_step_norm']) > 0 for row in metrics)
    assert all(float(row['rows_dropped']) == 0 for row in metrics)

    summary = strict(out / 'summary.json')
    for arm, last in zip(('softmax', 'center'), metrics[1::2], strict=True):
        for key in ('test_accuracy', 'nearest_center_accuracy', 'intra_inter_ratio'):
            assert summary[arm][key] == float(last[key])
    with Image.open(out / 'features.gif') as film:
        assert getattr(film, 'n_frames', 1) == 3  # before training and after each epoch
    with Image.open(out / 'features.png') as picture:
        assert picture.width > 800
    page = (out / 'report.html').read_text(encoding='utf-8')
    assert 'python -m experiments.toy2d --out' in page
    assert '--batch-size 125' in page


def test_tensorflow_is_not_imported():
    assert 'tensorflow' not in sys.modules


@pytest.mark.slow
def test_an_out_that_holds_a_run_is_refused_unless_it_may_be_overwritten(tmp_path, data_dir, capsys):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')
    (out / 'config.json').write_text('{}')
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    (elsewhere / 'notes.txt').write_text('mine too')
    (out / 'checkpoints').symlink_to(elsewhere)
    flags = ('--epochs', 1, *FAST, '--out', out, '--data-dir', data_dir)
    assert run(*flags) == 2
    assert (out / 'config.json').read_text() == '{}'
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert '--overwrite' in error

    assert run(*flags, '--overwrite') == 0
    assert strict(out / 'config.json')['epochs'] == 1
    assert (out / 'notes.txt').read_text() == 'mine'
    assert [path.name for path in elsewhere.iterdir()] == ['notes.txt']
    assert sorted(path.name for path in (out / 'checkpoints').iterdir()) == ['center', 'softmax']


@pytest.mark.parametrize('name', ['metrics.csv', 'report.html', 'checkpoints/mine.txt', 'profile/mine.txt'])
@pytest.mark.parametrize('flags', [(), ('--overwrite',), ('--resume',)])
def test_a_folder_that_holds_what_is_named_like_a_runs_files_but_no_run_is_left_as_it_is(
    tmp_path, data_dir, capsys, name, flags
):
    mine = tmp_path / 'mine' / name
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    assert run('--out', tmp_path / 'mine', '--data-dir', data_dir, *flags) == 2
    assert mine.read_text() == 'mine'
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert 'another folder' in error
    assert '--overwrite' not in error


@pytest.mark.parametrize('place', ['a file/run', 'a file', '/proc/run'])
def test_an_out_that_cannot_be_written_to_is_one_line_before_the_data_are_read(tmp_path, capsys, place):
    (tmp_path / 'a file').write_text('mine')
    assert run('--out', tmp_path / place, '--dataset', 'no such set') == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(words in error for words in ('--out', str(tmp_path / place), 'folder'))


@pytest.mark.parametrize('flag', ['--out', '--data-dir', '--dataset'])
def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    assert run(flag, '') == 2
    assert flag in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flag', ['--data-dir', '--mesh', '--coordinator'])
def test_a_flag_without_its_value_does_not_pass_in_silence(tmp_path, capsys, flag):
    assert run('--out', tmp_path / 'run', flag, '--epochs', 1) == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ('flag', 'value'),
    [
        ('--alpha', '1.5'),
        ('--alpha', 'nan'),
        ('--center-weight', '-1'),
        ('--center-weight', 'inf'),
        ('--center-weight', '1e39'),  # infinite in float32
        ('--epochs', '0'),
        ('--batch-size', '0'),
        ('--batch-size', '1439'),  # one more than there are train examples
        ('--image-size', '3'),
        ('--images-per-class', '-1'),
        ('--feature-dim', '0'),
        ('--learning-rate', '0'),
        ('--learning-rate', 'nan'),
        ('--learning-rate', '1e39'),
        ('--seed', '-1'),
        ('--dataset', 'no such set'),
        ('--mesh', 'data=2,classes=3'),  # of 8 devices
        ('--mesh', 'data=8,model=1'),
        ('--mesh', 'data=4,data=2'),
        ('--mesh', 'data=-2,classes=-4'),
        ('--mesh', 'data=8,'),
        ('--mesh', 'eight'),
        ('--mesh', ''),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it_and_exit_code_2(tmp_path, data_dir, capsys, flag, value):
    assert run('--out', tmp_path / 'run', '--data-dir', data_dir, flag, value) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert flag in error or value in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('batch_size', 'each', 'named'),
    [(32, 5, 'multiple of --images-per-class, got 32 and 5'), (88, 8, '11 classes a batch, but digits has only 10')],
)
def test_batches_of_p_by_k_that_cannot_be_are_one_line_that_names_both_flags(
    tmp_path, data_dir, capsys, batch_size, each, named
):
    flags = ('--batch-size', batch_size, '--images-per-class', each)
    assert run('--out', tmp_path / 'run', '--data-dir', data_dir, *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ('--batch-size', '--images-per-class', named))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('flag', 'value'),
    [('--epochs', 'two'), ('--model', 'resnet'), ('--parallel', 'all'), ('--resum', ''), ('--no-resume', '')],
)
def test_a_flag_or_a_value_that_cannot_be_parsed_is_named_and_exit_code_2(tmp_path, capsys, flag, value):
    assert run('--out', tmp_path / 'run', flag, *value.split()) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('parallel', ['pmap', 'none'])
def test_a_mesh_beside_another_way_to_use_the_devices_is_one_line_and_exit_code_2(tmp_path, capsys, parallel):
    assert run('--out', tmp_path / 'run', '--mesh', 'data=2,classes=4', '--parallel', parallel) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert '--mesh' in error
    assert f'--parallel {parallel}' in error


def test_help_explains_every_flag_with_its_default(capsys):
    assert run('--help') == 0
    text = ' '.join(capsys.readouterr().out.split())
    for field in dataclasses.fields(toy2d.Config):
        assert f'--{field.name.replace("_", "-")}' in text
    assert text.count('(default:') == len(dataclasses.fields(toy2d.Config))


@pytest.mark.slow
def test_weight_0_makes_the_center_arm_the_softmax_arm(tmp_path, data_dir):
    out = short(tmp_path, data_dir, center_weight=0.0)
    softmax, center = rows(out)
    timed = {'arm', 'epoch_seconds', 'steps_per_second'}
    assert {k: v for k, v in softmax.items() if k not in timed} == {k: v for k, v in center.items() if k not in timed}
    assert float(center['center_step_norm']) > 0


@pytest.mark.slow
def test_all_ways_to_use_the_devices_give_the_same_metrics_for_some_steps(tmp_path, data_dir):
    # The epoch has 6. Sums are rounded in another order, which training amplifies: after 60 losses differ.
    # On 8 devices neither a batch of 250 nor the short last one can be divided, nor can 10 classes on 4.
    ways = {'parallel': 'none'}, {'parallel': 'auto'}, {'parallel': 'pmap'}, {'mesh': 'data=2,classes=4'}
    alone, *runs = [rows(short(tmp_path, data_dir, batch_size=250, **way)) for way in ways]
    for name in COLUMNS - {'arm'}:
        for run in runs:
            values, expected = ([float(row[name]) for row in each] for each in (run, alone))
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_collapsed_features_are_said_to_have_collapsed(tmp_path, data_dir, capsys):
    out = short(tmp_path, data_dir, center_weight=1000.0, epochs=4, parallel='none')
    summary = strict(out / 'summary.json')
    assert summary['center']['collapsed']
    assert not summary['softmax']['collapsed']
    np.testing.assert_allclose(float(rows(out)[-1]['softmax_loss']), np.log(10), rtol=0.01)
    assert 'collapsed' in capsys.readouterr().out
    assert (out / 'features.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('feature_dim', [1, 5])
def test_any_feature_dimension_is_trained_and_drawn(tmp_path, data_dir, feature_dim):
    out = short(tmp_path, data_dir, feature_dim=feature_dim, parallel='none')
    assert (out / 'features.png').exists()
    assert strict(out / 'config.json')['feature_dim'] == feature_dim


@pytest.mark.slow
@pytest.mark.usefixtures('all_optimizations')
def test_the_defaults_reach_what_readme_says_on_the_digits(tmp_path, data_dir):
    results = []
    for seed in range(3):
        out = tmp_path / str(seed)
        config = dataclasses.replace(toy2d.Config(), out=out, data_dir=data_dir, seed=seed, parallel='none')
        toy2d.main(config)
        results.append(strict(out / 'summary.json'))
    mean = {
        arm: {key: np.mean([r[arm][key] for r in results]) for key in ('test_accuracy', 'intra_inter_ratio')}
        for arm in ('softmax', 'center')
    }
    assert mean['center']['test_accuracy'] >= 0.96
    assert mean['center']['intra_inter_ratio'] <= 0.6 * mean['softmax']['intra_inter_ratio']

"""The open-set experiment, run whole: what it writes, how it goes on, and the sets that it takes."""

import csv
import dataclasses
import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import verification
from experiments.train.logging import Progress
from tests.support import tiny
from tests.support.tiny import prepare

QUICK = ('--parallel', 'none', '--batch-size', 500, '--epochs', 2, '--seeds', 2)
MEASURES = {
    *('test_accuracy', 'nearest_center_accuracy', 'intra_inter_ratio', 'auc', 'eer', 'verification_accuracy'),
    *('tar_at_far_0.1', 'tar_at_far_0.01', 'tar_at_far_0.001', 'unknown_auroc'),
    *('rank_1', 'rank_5', 'map', 'r_precision', 'map_at_r'),
}


run = partial(tiny.run, verification)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without times."""
    with path.open(newline='', encoding='utf-8') as file:
        rows = [*csv.DictReader(file)]
    return [{key: v for key, v in row.items() if not key.endswith(('_seconds', '_per_second'))} for row in rows]


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('whole') / 'run'
    assert run(*QUICK, '--out', out) == 0
    return out


@pytest.mark.slow
def test_a_run_compares_both_arms_over_the_seeds(whole):
    rows = table(whole / 'verification.csv')
    assert [(row['arm'], row['seed']) for row in rows] == [
        (arm, seed) for seed in '01' for arm in ('softmax', 'center')
    ]
    summary: dict[str, Any] = json.loads((whole / 'summary.json').read_text())
    for name in MEASURES:
        for arm in ('softmax', 'center'):
            values = [float(row[name]) for row in rows if row['arm'] == arm]
            interval = summary[arm][name]
            np.testing.assert_allclose(interval['mean'], np.mean(values))
            assert interval['low'] <= min(values)
            assert interval['high'] >= max(values)
        added = summary['center']['auc']['mean'] - summary['softmax']['auc']['mean']
        np.testing.assert_allclose(summary['center - softmax']['auc']['mean'], added)
    assert len(table(whole / 'metrics.csv')) == 8
    config = json.loads((whole / 'config.json').read_text())
    assert config['num_classes'] == 7
    known = json.loads((whole / 'known.json').read_text())
    assert known['class_names'] == list('0123456')
    assert known['reach'].keys() == {'softmax-0', 'center-0', 'softmax-1', 'center-1'}
    with Image.open(whole / 'roc.png') as picture:
        assert picture.width > 800
    assert {row['queries_left_out'] for row in rows} == {'0'}
    assert summary['softmax']['queries_left_out'] == summary['center']['queries_left_out'] == 0
    page = (whole / 'report.html').read_text(encoding='utf-8')
    assert 'python -m experiments.verification' in page
    assert '±' in page
    assert all(name in page for name in ('AUROC of unknown classes', 'rank-1', 'rank-5', 'mAP', 'MAP@R'))


@pytest.mark.slow
def test_a_run_that_was_stopped_in_its_second_seed_goes_on_and_ends_alike(whole, tmp_path, monkeypatch, capsys):
    flags = (*QUICK, '--out', tmp_path / 'run', '--resume')
    start = Progress.start

    def interrupting(self, arm, *rest):
        if arm == 'softmax-1':
            signal.raise_signal(signal.SIGINT)
        start(self, arm, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'start', interrupting)
        assert run(*flags) == 130
    assert 'python -m experiments.verification' in capsys.readouterr().err
    assert run(*flags) == 0
    for name in ('metrics.csv', 'verification.csv'):
        assert table(tmp_path / 'run' / name) == table(whole / name)
    assert (tmp_path / 'run' / 'roc.png').read_bytes() == (whole / 'roc.png').read_bytes()
    assert run(*flags) == 0
    assert 'finished' in capsys.readouterr().out


@pytest.mark.slow
def test_other_held_out_classes_are_another_run(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / 'run')
    assert run(*QUICK, '--out', tmp_path / 'run', '--resume', '--held-out', '0-2') == 2
    assert 'held-out' in capsys.readouterr().err


@pytest.mark.parametrize(('flag', 'value'), [('--seeds', 0), ('--held-out', '9-12')])
def test_a_wrong_value_is_one_line_that_names_it_and_exit_code_2(tmp_path, capsys, flag, value):
    assert run('--out', tmp_path / 'run', flag, value) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert flag in error


def pictures_of(identities: int, each: int, size: int) -> list[tuple[Image.Image, int]]:
    """Pictures of identities, each of which has several: a pattern of its own under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (identities, 8, 8, 3))
    found = []
    for identity in np.repeat(np.arange(identities), each):
        noisy = (patterns[identity] + rng.integers(0, 50, (8, 8, 3))).astype(np.uint8)
        found.append((Image.fromarray(noisy).resize((size, size)), int(identity)))
    return found


def public_features(name: str, tmp_path: Path) -> dict[str, Any]:
    """Image and label as the public set has them."""
    features: Any = tfds.builder(name, data_dir=tmp_path / 'nothing').info.features
    return {key: features[key] for key in ('image', 'label')}


@pytest.mark.slow
def test_omniglot_whose_splits_have_alphabets_of_their_own_is_verified_on_those_of_the_test_split(tmp_path, capsys):
    pictures = pictures_of(8, 6, 105)
    by_split = {'train': [p for p in pictures if p[1] < 5], 'test': [p for p in pictures if p[1] >= 5]}
    prepare(tmp_path, by_split, name='omniglot', features=public_features('omniglot', tmp_path))
    out = tmp_path / 'run'
    flags = ('--dataset', 'omniglot', '--data-dir', tmp_path, '--image-size', 28, '--out', out)
    assert run(*flags, '--parallel', 'none', '--epochs', 1, '--seeds', 1, '--batch-size', 8) == 0
    said = capsys.readouterr().out
    assert '5 classes are trained on, 25 images; 3 others are verified (' in said
    assert '), 18 images\n' in said
    config = json.loads((out / 'config.json').read_text())
    assert (config['num_classes'], config['image_shape']) == (5, [28, 28, 3])
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['center']['auc']['low'] is None


@pytest.mark.slow
def test_lfw_whose_labels_are_names_and_which_has_one_split_is_verified_on_some_of_its_people(tmp_path, capsys):
    people = [f'Person_{letter}'.encode() for letter in 'ABCDEFGHIJ']
    pictures = [(image, people[label]) for image, label in pictures_of(10, 6, 250)]
    order = np.random.default_rng(0).permutation(len(pictures))
    shuffled = [pictures[place] for place in order]
    prepare(tmp_path, {'train': shuffled}, name='lfw', features=public_features('lfw', tmp_path))
    out = tmp_path / 'run'
    flags = ('--dataset', 'lfw', '--data-dir', tmp_path, '--image-size', 16, '--out', out)
    assert run(*flags, '--parallel', 'none', '--epochs', 1, '--seeds', 1, '--batch-size', 8) == 0
    assert re.search(r'3 others are verified \(Person_\w(, Person_\w){2}\), 18 images', capsys.readouterr().out)
    known = json.loads((out / 'known.json').read_text())
    assert known['class_names'] == [f'Person_{letter}' for letter in 'ABCDEFG']


@pytest.mark.slow
def test_a_folder_of_identities_is_verified(tmp_path, capsys):
    for number, (image, label) in enumerate(pictures_of(4, 5, 8)):
        folder = tmp_path / 'people' / f'person {label}'
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f'{number}.png')
    flags = ('--dataset', tmp_path / 'people', '--data-dir', tmp_path, '--held-out', '2-3')
    assert run(*flags, *QUICK[:-1], 1, '--out', tmp_path / 'run') == 0
    assert '2 classes are trained on' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures('all_optimizations')
def test_the_defaults_find_what_readme_says_on_the_digits(tmp_path):
    out = tmp_path / 'run'
    verification.main(dataclasses.replace(verification.Config(), out=out, parallel='none'))
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['center - softmax']['unknown_auroc']['low'] > 0
    assert summary['center - softmax']['intra_inter_ratio']['high'] < 0
    assert summary['center']['auc']['mean'] > 0.6

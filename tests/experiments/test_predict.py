"""Images labelled by a trained run: what is written, what is unknown, and what it says to what it cannot read."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import predict, toy2d
from experiments.data.load import load
from experiments.train.checkpoint import saved_params
from tests.support import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def trained(whole, tmp_path_factory) -> Path:
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp('trained') / 'a run'))


run = partial(tiny.run, predict)


def predictions(out: Path) -> list[dict[str, str]]:
    with (out / 'predictions.csv').open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ('name', 'content', 'cure'),
    [
        ('known.json', b'{"reach": 3}', '--resume'),
        ('known.json', b'{', '--resume'),
        ('config.json', b'{"model": "small", "feature_dim": 2}', '--overwrite'),
        ('config.json', None, '--overwrite'),
    ],
)
def test_a_damaged_file_of_the_run_is_one_line_that_names_it_and_the_cure(
    trained, tmp_path, capsys, name, content, cure
):
    for other in ('known.json', 'config.json'):
        shutil.copy(trained / other, tmp_path / other)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run('--images', 'digits:test', '--run', tmp_path) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert name in error
    assert cure in error


@pytest.mark.parametrize('arm', ['softmax', 'center'])
def test_a_test_split_is_labelled_as_in_training_and_a_twentieth_of_it_is_too_far(trained, tmp_path, arm):
    assert run('--images', 'digits:test', '--run', trained, '--arm', arm, '--out', tmp_path) == 0
    rows = predictions(tmp_path)
    _, labels = load('digits').test.take(range(len(rows)))
    right = np.mean([row['nearest'] == str(label) for row, label in zip(rows, labels, strict=True)])
    summary = json.loads((trained / 'summary.json').read_text())
    np.testing.assert_allclose(right, summary[arm]['nearest_center_accuracy'], rtol=1e-6)
    reach = json.loads((trained / 'known.json').read_text())['reach'][arm]
    far = [row['label'] == 'unknown' for row in rows]
    assert far == [float(row['distance']) > reach for row in rows]
    assert 0.03 < np.mean(far) <= 0.05
    assert all(row['label'] == row['nearest'] for row, own in zip(rows, far, strict=True) if not own)
    with Image.open(tmp_path / 'predictions.png') as sheet:
        assert sheet.width > 800


def test_a_folder_of_files_gives_what_the_split_that_they_are_from_gives(trained, tmp_path):
    images, _ = load('digits').test.take(range(20))
    for number, image in enumerate(images):
        path = tmp_path / 'images' / f'some {number % 2}' / f'{number:02d}.{"png" if number else "PNG"}'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).convert('RGB').save(path)
    assert run('--images', tmp_path / 'images', '--run', trained) == 0
    assert run('--images', 'digits:test', '--run', trained, '--out', tmp_path / 'split') == 0
    split = predictions(tmp_path / 'split')
    rows = predictions(trained / 'predictions')
    assert len(rows) == 20
    for row in rows:
        same = split[int(Path(row['image']).stem)]
        assert (row['label'], row['nearest']) == (same['label'], same['nearest'])
        np.testing.assert_allclose(float(row['distance']), float(same['distance']), rtol=1e-4)


def test_embeddings_are_read_without_pickle_and_replaced_only_if_they_may_be(trained, tmp_path, capsys):
    file = tmp_path / 'digits.npz'
    flags = '--images', 'digits:test', '--run', trained, '--out', tmp_path / 'out', '--embeddings'
    assert run(*flags, file) == 0
    with np.load(file, allow_pickle=False) as arrays:
        found = dict(arrays)
    rows = predictions(tmp_path / 'out')
    assert (found['features'].shape, found['features'].dtype) == ((len(rows), 2), np.float32)
    assert found['names'].tolist() == [row['image'] for row in rows]
    assert found['nearest'].tolist() == [row['nearest'] for row in rows]
    np.testing.assert_allclose(found['distances'], [float(row['distance']) for row in rows], rtol=1e-6)
    centers = saved_params(trained / 'checkpoints' / 'center')['centers']['center']['centers']
    nearest = centers[found['nearest'].astype(int)]
    np.testing.assert_allclose(np.linalg.norm(found['features'] - nearest, axis=1), found['distances'], rtol=1e-4)
    before = file.read_bytes()
    for path, named in ((file, '--overwrite'), (tmp_path / 'no' / 'a.npz', 'folder'), (tmp_path / 'a.csv', '.npz')):
        capsys.readouterr()
        assert run(*flags, path, '--out', tmp_path / 'other') == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert '--embeddings' in error
        assert named in error
    assert file.read_bytes() == before
    assert run(*flags, file, '--overwrite') == 0


def test_a_mesh_labels_as_one_device_does(trained, tmp_path):
    flags = '--images', 'digits:test', '--run', trained
    assert run(*flags, '--out', tmp_path / 'one', '--parallel', 'none') == 0
    assert run(*flags, '--out', tmp_path / 'mesh', '--mesh', 'data=2,classes=4') == 0
    for row, expected in zip(predictions(tmp_path / 'mesh'), predictions(tmp_path / 'one'), strict=True):
        assert row['nearest'] == expected['nearest']
        np.testing.assert_allclose(float(row['distance']), float(expected['distance']), rtol=1e-4)


def test_an_image_that_is_no_digit_is_unknown(tmp_path):
    trained = tmp_path / 'run'
    assert tiny.run(toy2d, '--epochs', 6, '--batch-size', 50, '--parallel', 'none', '--out', trained) == 0
    (tmp_path / 'images').mkdir()
    for name, pixels in (('white', np.full((30, 40, 3), 255)), ('chequered', np.indices((8, 8)).sum(0) % 2 * 255)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'images' / f'{name}.png')
    assert run('--images', tmp_path / 'images', '--run', trained, '--out', tmp_path) == 0
    assert 'unknown' in {row['label'] for row in predictions(tmp_path)}


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (('--images', 'digits'), ('--images', ':train', ':test')),
        (('--images', ''), ('--images',)),
        (('--images', 'digits:validation'), (':train', ':test')),
        (('--images', 'digits:test', '--arm', 'triplet'), ('triplet', 'softmax', 'center')),
        (('--images', 'digits:test', '--run', 'nowhere'), ('nowhere', '--resume')),
        (('--images', '{empty}'), ('*.png|jpg|jpeg|webp',)),
        (('--images', '{broken}'), ('broken.png',)),
    ],
)
def test_what_cannot_be_labelled_is_one_line_that_says_why_and_exit_code_2(trained, tmp_path, capsys, flags, named):
    folders = {name: tmp_path / name for name in ('empty', 'broken')}
    for folder in folders.values():
        folder.mkdir()
    (folders['broken'] / 'broken.png').write_bytes(b'no image')
    assert run('--run', trained, '--out', tmp_path / 'out', *(flag.format(**folders) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in named)
    assert not (tmp_path / 'out').exists()


def test_a_command_without_images_names_the_flag_and_has_exit_code_2(capsys):
    assert run() == 2
    assert '--images' in capsys.readouterr().err


def test_a_damaged_save_is_one_line_that_says_how_to_make_it_anew(trained, tmp_path, capsys):
    broken = tmp_path / 'run'
    shutil.copytree(trained, broken)
    for path in (broken / 'checkpoints' / 'center').glob('*/state/**/d/*'):
        path.write_bytes(path.read_bytes()[:50])
    capsys.readouterr()
    assert run('--run', broken, '--images', 'digits:test', '--out', tmp_path / 'out') == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert 'is damaged' in error
    assert '--resume' in error


def test_predictions_in_a_folder_of_ones_own_are_replaced_only_if_they_may_be(trained, tmp_path, capsys):
    (tmp_path / 'predictions.csv').write_text('mine')
    flags = '--images', 'digits:test', '--run', trained, '--out', tmp_path
    assert run(*flags) == 2
    assert '--overwrite' in capsys.readouterr().err
    assert (tmp_path / 'predictions.csv').read_text() == 'mine'
    assert run(*flags, '--overwrite') == 0
    assert predictions(tmp_path)[0]['image'] == 'digits:test:0'

"""Which files are images of which class: one set of rules for training and for predict."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import predict
from experiments.data.image_files import natural_order
from experiments.data.load import load
from experiments.launch.errors import DataError
from tests.support.tiny import all_of


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), len(path.name)).save(path)
    return path


def classes(root: Path, *names: str, count: int = 2) -> Path:
    """A folder of these classes, each of so many images."""
    for name in names:
        for number in range(count):
            write(root / name / f'{number}.png')
    return root


def predicted(root: Path) -> tuple[list[str], list[str]]:
    """The images that predict labels, and what it says of the others."""
    said = []
    names, _ = predict._images(predict.Config(images=str(root)), [8, 8, 1], said.append)
    return names, said


def trained(root: Path, cache: Path) -> tuple[int, tuple[str, ...]]:
    """How many images a run trains and tests on, and what it says of the others."""
    data = load(str(root), cache)
    return len(data.train) + len(data.test), data.notes


@pytest.fixture
def cache(tmp_path) -> Path:
    path = tmp_path / 'cache'
    path.mkdir()
    return path


def test_hidden_files_and_folders_are_no_images(tmp_path, cache):
    root = classes(tmp_path / 'own', 'cat', 'dog')
    write(root / 'cat' / '.ipynb_checkpoints' / '0.png')
    write(root / '.trash' / '0.png')
    (root / 'cat' / '._0.png').write_bytes(b'\0\5\x16\7' + bytes(100))  # what macOS writes beside 0.png
    assert trained(root, cache)[0] == 4
    assert predicted(root) == (['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png'], [])


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path, cache):
    real = classes(tmp_path / 'real', 'cat', 'dog')
    root = tmp_path / 'links'
    root.mkdir()
    for name in ('cat', 'dog'):
        (root / name).symlink_to(real / name)
    (real / 'cat' / 'up').symlink_to(root)
    assert trained(root, cache)[0] == 4
    assert predicted(root)[0] == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']


def test_a_pipe_is_left_out_and_said(tmp_path, cache):
    root = classes(tmp_path / 'own', 'cat', 'dog')
    os.mkfifo(root / 'cat' / 'pipe.png')
    count, notes = trained(root, cache)
    assert count == 4
    names, said = predicted(root)
    assert len(names) == 4
    for lines in (notes, said):
        assert [line for line in lines if 'no regular files: cat/pipe.png' in line]


def test_a_broken_link_is_unreadable_for_both(tmp_path, cache):
    root = classes(tmp_path / 'own', 'cat', 'dog')
    (root / 'cat' / 'link.png').symlink_to('nowhere')
    with pytest.raises(DataError, match=r'cat/link\.png'):
        trained(root, cache)
    with pytest.raises(DataError, match=r'cat/link\.png cannot be read'):
        predicted(root)


@pytest.mark.parametrize(('image_size', 'shape'), [(0, (64, 64, 3)), (128, (128, 128, 3))])
def test_training_and_predict_resize_a_file_once_to_the_same_pixels(tmp_path, cache, image_size, shape):
    stripes = np.tile(np.repeat(np.array([32, 224], np.uint8), 4), (300, 40))
    for number, (mode, suffix) in enumerate([('RGB', 'png'), ('L', 'jpg'), ('RGB', 'webp'), ('LA', 'png')] * 2):
        path = tmp_path / 'own' / f'{number % 2}' / f'{number}.{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stripes[: 200 + number, : 128 + 8 * number]).convert(mode).save(path)
    trained, _ = all_of(load(str(tmp_path / 'own'), cache, image_size))
    _, split = predict._images(predict.Config(images=str(tmp_path / 'own')), list(shape), print)
    assert trained.shape == (8, *shape)
    for image in trained:  # in another order
        assert (split.images == image).all(axis=(1, 2, 3)).any()
    if image_size:
        assert trained.std(axis=2).min() > 70  # 96 in the files, 25 by way of 64 x 64


def test_copies_of_two_sizes_are_kept_until_the_files_change(tmp_path, cache):
    root = classes(tmp_path / 'own', 'cat', 'dog')
    for image_size in (0, 16):
        load(str(root), cache, image_size)
    assert len([*cache.glob('image_folders/*')]) == 2
    write(root / 'cat' / 'new.png')
    load(str(root), cache, 16)
    assert len([*cache.glob('image_folders/*')]) == 1


def test_predict_leaves_out_unreadable_files_if_it_may(tmp_path):
    root = classes(tmp_path / 'own', 'cat')
    (root / 'cat' / 'broken.png').touch()
    with pytest.raises(DataError, match=r'broken\.png cannot be read; .*--skip-unreadable'):
        predicted(root)
    said = []
    config = predict.Config(images=str(root), skip_unreadable=True)
    names, split = predict._images(config, [8, 8, 1], said.append)
    assert (names, len(split)) == (['cat/0.png', 'cat/1.png'], 2)
    assert said[0].startswith('cat/broken.png cannot be read and is left out: ')
    for path in root.rglob('[01].png'):
        path.unlink()
    with pytest.raises(DataError, match='no image that can be read'):
        predict._images(config, [8, 8, 1], said.append)


def test_predict_names_the_files_that_it_leaves_out(tmp_path):
    root = classes(tmp_path / 'own', 'cat')
    (root / 'notes.txt').touch()
    assert predicted(root)[1] == ['files left out, since they are no *.png|jpg|jpeg|webp: notes.txt']


@pytest.mark.parametrize('name', ['val', 'valid', 'validation'])
def test_a_validation_folder_is_the_test_split_where_there_is_no_other(tmp_path, cache, name):
    root = tmp_path / 'own'
    classes(root / 'train', 'a', 'b', count=3)
    classes(root / name, 'a', 'b')
    data = load(str(root), cache)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.notes == (f'there is no test/: the images of {name}/ are the test images',)
    classes(root / 'test', 'a', 'b', count=1)
    data = load(str(root), cache)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert f'{name}/a/0.png' in data.notes[0]


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['10', '9', '2'], ['2', '9', '10']),
        (['10', '1', '01'], ['01', '1', '10']),
        (['10', '9', 'x'], ['10', '9', 'x']),
        (['²', '10', '9'], ['10', '9', '²']),
    ],
)
def test_names_are_sorted_as_numbers_where_all_are_numbers(names, expected):
    assert natural_order(names) == expected


def test_folders_of_numbers_are_classes_in_the_order_of_the_numbers(tmp_path, cache):
    names = [str(number) for number in range(1, 13)]
    data = load(str(classes(tmp_path / 'own', *names)), cache)
    assert data.class_names == tuple(names)


@pytest.mark.parametrize(
    'names', [['cat', 'cat '], ['cat', '  ', 'dog'], ['a\nb', 'c'], ['b\r', 'a\u2028', 'c'], ['Ä', 'ä']]
)
def test_names_of_classes_come_back_as_they_were(tmp_path, cache, names):
    root = classes(tmp_path / 'own', *names)
    for _ in ('prepared', 'read again'):
        data = load(str(root), cache)
        assert list(data.class_names) == sorted(names)
        assert set(data.train.labels.tolist()) == set(range(len(names)))


def test_a_class_whose_name_is_no_utf_8_is_one_line(tmp_path, cache):
    root = classes(tmp_path / 'own', 'cat', os.fsdecode(b'caf\xe9'))
    with pytest.raises(DataError, match=r'caf\\xe9 has a name that is no UTF-8; rename it') as error:
        load(str(root), cache)
    assert str(error.value).isprintable()


def test_a_line_names_the_first_classes_and_counts_the_images(tmp_path, cache):
    data = load(str(classes(tmp_path / 'market', 'bounding_box_test', 'bounding_box_train', 'query', 'x')), cache)
    assert data.overview == (
        'market has 4 classes (bounding_box_test, bounding_box_train, query and 1 more), 4 train and 4 test images'
    )

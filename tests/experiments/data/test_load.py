import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import load as module
from experiments.data import splits
from experiments.data.load import load
from experiments.launch.errors import DataError
from tests.support.tiny import examples, prepare


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)


def by_number(split):
    """Label and pixels of each example, by the number in its top left pixel."""
    images, labels = split.take(range(len(split)))
    return {int(image[0, 0, 0]): (int(label), image) for image, label in zip(images, labels, strict=True)}


def test_a_prepared_copy_gives_the_images_and_labels_that_were_put_in(tmp_path):
    train, test = examples(12), examples(5, first=12)
    prepare(tmp_path, {'train': train, 'test': test})
    dataset = load('mnist', tmp_path)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ('mnist', 3, (4, 6, 1))
    assert dataset.class_names == ('0', '1', '2')
    assert dataset.notes == ()
    for split, expected, first in ((dataset.train, train, 0), (dataset.test, test, 12)):
        assert isinstance(split, splits.Split)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        found = by_number(split)
        assert sorted(found) == list(range(first, first + len(expected)))
        for number, (image, label) in enumerate(expected, first):
            assert found[number][0] == label
            np.testing.assert_array_equal(found[number][1][..., 0], np.asarray(image))


def test_reading_takes_neither_tensorflow_nor_a_network(tmp_path):
    prepare(tmp_path, {'train': examples(6), 'test': examples(3)})
    program = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):
        raise AssertionError(f'{event} {arguments}')

sys.addaudithook(refuse)
from experiments.data.load import load
for dataset in ('mnist', 'digits'):
    load(dataset, Path(sys.argv[1]))
print('tensorflow' in sys.modules)
"""
    command = [sys.executable, '-W', 'error', '-c', program, str(tmp_path)]
    root = Path(module.__file__).parents[2]
    assert subprocess.check_output(command, text=True, cwd=root) == 'False\n'


@pytest.mark.parametrize(
    ('versions', 'name', 'expected'),
    [
        (['1.0.0'], 'mnist', 1),
        (['2.0.0', '10.0.0'], 'mnist', 10),
        (['2.0.0', '10.0.0'], 'mnist:2.0.0', 2),
    ],
)
def test_a_copy_is_read_whatever_version_the_code_has(tmp_path, versions, name, expected):
    for version in versions:
        count = int(version.split('.')[0])
        prepare(tmp_path, {'train': examples(count), 'test': examples(1)}, version=version)
    assert len(load(name, tmp_path).train) == expected


def test_of_several_configurations_one_must_be_named(tmp_path):
    for config, count in (('letters', 4), ('digits', 7)):
        prepare(tmp_path, {'train': examples(count), 'test': examples(1)}, name='emnist', config=config)
    assert len(load('emnist/letters', tmp_path).train) == 4
    with pytest.raises(DataError, match='name one: emnist/digits, emnist/letters'):
        load('emnist', tmp_path)


def test_a_split_too_large_for_memory_gives_the_same_examples(tmp_path, monkeypatch):
    prepare(tmp_path, {'train': examples(12), 'test': examples(5)})
    in_memory = load('mnist', tmp_path)
    monkeypatch.setattr(splits, 'MEMORY_LIMIT', 5 * 4 * 6)
    dataset = load('mnist', tmp_path)
    assert isinstance(dataset.train, splits.LazySplit)
    assert isinstance(dataset.test, splits.Split)
    assert dataset.image_shape == (4, 6, 1)
    assert len(dataset.train) == 12
    for found, expected in zip(dataset.train.take([7, 2, 2]), in_memory.train.take([7, 2, 2]), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_images_of_unknown_size_are_resized_and_a_note_says_so(tmp_path):
    grey = Image.new('L', (10, 20), 7)
    colour = Image.new('RGB', (30, 20), (1, 2, 3))
    pictures = {'train': [(grey, 0), (colour, 1)], 'test': [(colour, 1)]}
    prepare(tmp_path, pictures, image_shape=(None, None, 3))
    dataset = load('mnist', tmp_path)
    assert dataset.image_shape == (64, 64, 3)
    images, labels = dataset.train.take([0, 1])
    assert images[labels == 0].min() == images[labels == 0].max() == 7
    assert (images[labels == 1] == [1, 2, 3]).all()
    (note,) = dataset.notes
    assert '64x64' in note


@pytest.mark.parametrize('unlabelled', [{}, {'test': examples(2, label=-1)}])
def test_validation_stands_in_for_a_test_split(tmp_path, unlabelled):
    prepare(tmp_path, {'train': examples(9), 'validation': examples(4), **unlabelled})
    dataset = load('mnist', tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (9, 4)
    (note,) = dataset.notes
    assert 'validation' in note


def test_without_any_test_split_a_fifth_of_the_train_images_is_held_out(tmp_path):
    prepare(tmp_path, {'train': examples(23)})
    dataset, again = load('mnist', tmp_path), load('mnist', tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (19, 4)
    assert sorted(by_number(dataset.train) | by_number(dataset.test)) == list(range(23))
    assert by_number(dataset.test).keys() == by_number(again.test).keys()
    (note,) = dataset.notes
    assert 'held out' in note


def test_a_set_without_train_split_is_an_error(tmp_path):
    prepare(tmp_path, {'test': examples(3)})
    with pytest.raises(DataError, match='no split named train, only test'):
        load('mnist', tmp_path)


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'kmnist', 'cifar10', 'cifar100', 'svhn_cropped'])
def test_public_sets_are_recognised_as_image_classification(tmp_path, name):
    builder = tfds.builder(name, data_dir=tmp_path)
    assert module._keys(name, builder.info) == ('image', 'label')


def test_other_sets_are_one_clear_line(tmp_path):
    several = {
        'image': tfds.features.Image(shape=(4, 6, 1)),
        'label': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3)),
    }
    pictures = [(image, [label, 2]) for image, label in examples(3)]
    prepare(tmp_path, {'train': pictures}, features=several)
    with pytest.raises(DataError, match='mnist is no set for image classification') as error:
        load('mnist', tmp_path)
    assert 'label (Sequence)' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('name', 'suggestion'), [('mnits', 'mnist'), ('cifar-10', 'cifar10'), ('digit', 'digits')])
def test_an_unknown_name_is_one_line_with_the_names_that_are_near(tmp_path, name, suggestion):
    with pytest.raises(DataError, match=f'{name} is neither .* did you mean .*{suggestion}') as error:
        load(name, tmp_path)
    assert '\n' not in str(error.value)


def test_a_set_that_no_catalogue_has_is_read_where_it_is_prepared(tmp_path):
    prepare(tmp_path, {'train': examples(6), 'test': examples(3)}, name='my_own_digits')
    assert len(load('my_own_digits', tmp_path).train) == 6


def test_a_copy_in_another_format_is_one_clear_line(tmp_path):
    info = prepare(tmp_path, {'train': examples(6), 'test': examples(3)}) / 'dataset_info.json'
    info.write_text(json.dumps(json.loads(info.read_text()) | {'fileFormat': 'tfrecord'}))
    with pytest.raises(DataError, match='stored as tfrecord, but reading needs array_record') as error:
        load('mnist', tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('damage', [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
@pytest.mark.parametrize('file', ['mnist-train.array_record-00000-of-00001', 'features.json'])
def test_a_damaged_copy_is_an_error_that_says_where(tmp_path, no_tensorflow, file, damage):
    damage(prepare(tmp_path, {'train': examples(60), 'test': examples(3)}) / file)
    with pytest.raises(DataError, match=str(tmp_path)) as error:
        load('mnist', tmp_path)
    assert len(str(error.value).splitlines()) <= 10


def in_place(text: str, name: str) -> str:
    return text.replace('tensorflow_datasets.core.features.image_feature.Image', name)


def in_snake_case(text: str, name: str) -> str:
    return in_place(text.replace('pythonClassName', 'python_class_name'), name)


def in_the_old_form(text: str, name: str) -> str:
    del text
    features = {'image': {'type': name, 'content': {}}}
    return json.dumps({'type': 'tensorflow_datasets.core.features.features_dict.FeaturesDict', 'content': features})


def in_a_string(text: str, name: str) -> str:
    content = json.dumps({'features': {'image': {'pythonClassName': name}}})
    kind = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
    return json.dumps({'type': kind, 'proto_cls': 'tensorflow_datasets.FeaturesDict', 'content': content})


@pytest.mark.parametrize('name_it', [in_place, in_snake_case, in_the_old_form, in_a_string])
def test_a_copy_makes_no_module_be_imported(tmp_path, monkeypatch, name_it):
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'named_by_a_copy.py').write_text(f'open({str(tmp_path / "imported")!r}, "w").close()')
    monkeypatch.syspath_prepend(tmp_path / 'modules')
    path = prepare(tmp_path / 'data', {'train': examples(6), 'test': examples(3)}) / 'features.json'
    path.write_text(name_it(path.read_text(), 'named_by_a_copy.Image'))
    with pytest.raises(DataError) as error:
        load('mnist', tmp_path / 'data')
    sys.modules.pop('named_by_a_copy', None)
    assert not (tmp_path / 'imported').exists()
    assert 'named_by_a_copy.Image' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_copy_that_is_not_complete_is_not_taken_for_whole(tmp_path, no_tensorflow):
    copy = prepare(tmp_path, {'train': examples(6), 'test': examples(3)})
    copy.rename(copy.with_name('incomplete.4XT2QG_3.0.1'))
    with pytest.raises(DataError, match=r'mnist is not in .* yet'):
        load('mnist', tmp_path)


@pytest.mark.parametrize('name', ['absent', 'file'])
@pytest.mark.parametrize('dataset', ['digits', 'mnist', 'images', 'table.npz'])
def test_a_data_dir_that_does_not_exist_is_an_error(tmp_path, dataset, name):
    (tmp_path / 'file').touch()
    with pytest.raises(DataError, match=rf'--data-dir .*/{name} is not a folder that exists; create it'):
        load(dataset, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_without_tensorflow_the_error_names_the_extra_that_brings_it(tmp_path, no_tensorflow):
    with pytest.raises(DataError, match='cifar10') as error:
        load('cifar10', tmp_path)
    assert 'python -m pip install -e ".[prepare]"' in str(error.value)
    assert '--data-dir' in str(error.value)
    assert len(str(error.value).splitlines()) <= 10


def test_a_data_dir_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / 'digits').touch()
    with pytest.raises(DataError, match='digits could not be read or prepared in'):
        load('digits', tmp_path)


def test_prepared_sets_go_to_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    load('digits')
    assert (tmp_path / 'centerloss_jax' / 'digits' / '1.0.0' / 'features.json').exists()


def test_a_cache_without_a_home_is_one_line():
    with pytest.raises(DataError, match=r'~nobody-here/data has no place .*--data-dir'):
        load('digits', Path('~nobody-here/data'))

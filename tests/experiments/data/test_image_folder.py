import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from experiments.data.image_folder import open_image
from experiments.data.load import load
from experiments.launch.atomic_files import lock
from experiments.launch.errors import DataError
from tests.support.tiny import all_of, counts


def write(path: Path, color, mode: str = 'RGB', size: tuple[int, int] = (6, 4)) -> Path:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten cats and five dogs, not divided; red is the number, green the class."""
    for number in range(10):
        write(tmp_path / 'pets' / 'cat' / f'{number}.png', (number, 0, 0))
    for number in range(5):
        write(tmp_path / 'pets' / 'dog' / f'{number}.png', (number, 255, 0))
    return tmp_path / 'pets'


@pytest.fixture
def cache(tmp_path) -> Path:
    path = tmp_path / 'cache'
    path.mkdir()
    return path


def note_with(dataset, text: str) -> str:
    (note,) = [note for note in dataset.notes if text in note]
    return note


def test_a_folder_of_classes_is_divided_by_class(folder, cache):
    dataset = load(str(folder), cache)
    assert dataset.name == 'pets'
    assert dataset.class_names == ('cat', 'dog')
    assert dataset.image_shape == (4, 6, 3)
    assert counts(dataset.train).tolist() == [8, 4]
    assert counts(dataset.test).tolist() == [2, 1]
    assert note_with(dataset, 'a fifth of each class')
    images, labels = all_of(dataset)
    assert (images[..., 1] == 255 * labels[:, None, None]).all()
    assert sorted(images[labels == 0][:, 0, 0, 0]) == list(range(10))
    np.testing.assert_array_equal(all_of(load(str(folder), cache))[0], images)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'jpeg', 'JPG', 'webp'])
def test_train_and_test_folders_are_taken_as_they_are(tmp_path, cache, suffix):
    for split, count in (('train', 3), ('test', 2)):
        for name, color in (('b', (0, 0, 255)), ('a', (255, 0, 0))):
            for number in range(count):
                write(tmp_path / 'own' / split / name / f'{number}.{suffix}', color)
    dataset = load(str(tmp_path / 'own'), cache)
    assert dataset.class_names == ('a', 'b')
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    assert dataset.notes == ()
    images, labels = all_of(dataset)
    assert ((images[..., 0].mean(axis=(1, 2)) > 250) == (labels == 0)).all()


@pytest.mark.parametrize(('there', 'missing'), [('train', 'test'), ('test', 'train')])
def test_a_split_without_the_other_is_an_error_that_names_the_missing_one(tmp_path, cache, there, missing):
    for name in ('a', 'b'):
        write(tmp_path / 'own' / there / name / '0.png', (0, 0, 255))
    with pytest.raises(DataError, match=f'none in {missing}/'):
        load(str(tmp_path / 'own'), cache)


def test_classes_named_train_and_test_are_classes(tmp_path, cache):
    for name in ('train', 'test'):
        for number in range(2):
            write(tmp_path / 'own' / name / f'{number}.png', (number, 0, 0))
    assert load(str(tmp_path / 'own'), cache).class_names == ('test', 'train')


def change_a_file(folder):
    write(folder / 'dog' / '0.png', (77, 255, 0))


def add_a_file(folder):
    write(folder / 'dog' / 'new.png', (77, 255, 0))


def remove_a_file(folder):
    (folder / 'dog' / '0.png').unlink()


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (change_a_file, [1, 2, 3, 4, 77]),
        (add_a_file, [0, 1, 2, 3, 4, 77]),
        (remove_a_file, [1, 2, 3, 4]),
    ],
)
def test_a_folder_is_prepared_again_when_its_files_change(folder, cache, change, expected):
    def dogs():
        images, labels = all_of(load(str(folder), cache))
        return sorted(images[labels == 1][:, 0, 0, 0])

    assert dogs() == [0, 1, 2, 3, 4]
    change(folder)
    assert dogs() == expected
    assert len(list(cache.glob('image_folders/pets-*'))) == 1


def test_the_copy_that_another_run_reads_stays(folder, cache):
    load(str(folder), cache)
    (home,) = cache.glob('image_folders/pets-*')
    with pytest.raises(BlockingIOError), lock(home / '.lock', wait=False):
        pass
    with lock(home / '.lock', shared=True):
        change_a_file(folder)
        load(str(folder), cache)
        assert list(home.rglob('*.array_record*'))
    load(str(folder), cache)
    assert not home.exists()


def test_no_program_is_started_for_an_image(folder, cache, tmp_path, monkeypatch):
    programs = tmp_path / 'programs'
    programs.mkdir()
    (programs / 'gs').write_text(f'#!/bin/sh\ntouch "{tmp_path / "started"}"\n')
    (programs / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)  # Pillow keeps what it found before
    (folder / 'cat' / 'z.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\n%%EOF\n')
    with pytest.raises(DataError, match=r'z\.png: cannot identify'):
        load(str(folder), cache)
    assert not (tmp_path / 'started').exists()


@pytest.mark.parametrize('image_format', ['JPEG', 'MPO', 'GIF', 'BMP', 'TIFF', 'WEBP'])
def test_an_image_with_the_suffix_of_another_format_is_read(folder, cache, image_format):
    image = Image.new('RGB', (6, 4), (77, 0, 0))
    frames = {'save_all': True, 'append_images': [image]} if image_format == 'MPO' else {}
    image.save(folder / 'cat' / '10.png', image_format, **frames)
    with Image.open(folder / 'cat' / '10.png') as file:
        assert file.format == image_format
    assert (all_of(load(str(folder), cache))[1] == 0).sum() == 11


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG."""
    checked = zlib.crc32(name + body) if crc is None else crc
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', checked)


BOMB = b'Comment\0\0' + zlib.compress(bytes(2**21))  # beyond what Pillow unpacks of a text


@pytest.mark.parametrize(
    'odd',
    [
        chunk(b'eXIf', bytes.fromhex('0008000201120003')),  # no TIFF header
        chunk(b'zTXt', BOMB),
        chunk(b'tEXt', b'Comment\0x', crc=1),
        chunk(b'pHYs', b'\0'),
    ],
    ids=['no TIFF', 'large text', 'wrong checksum', 'cut'],
)
@pytest.mark.parametrize('before', [b'IDAT', b'IEND'])
def test_damaged_metadata_costs_no_pixels(folder, cache, odd, before):
    path = write(folder / 'cat' / 'odd.png', (200, 0, 0))
    content = path.read_bytes()
    at = content.index(before) - 4
    path.write_bytes(content[:at] + odd + content[at:])
    for _ in ('prepared', 'read again'):
        dataset = load(str(folder), cache)
        images, _ = all_of(dataset)
        assert (images == [200, 0, 0]).all(axis=(1, 2, 3)).sum() == 1
    image, _, _ = open_image(path)
    assert image.getpixel((0, 0)) == (200, 0, 0)


def test_damaged_metadata_is_said(folder, cache):
    path = write(folder / 'cat' / 'odd.png', (200, 0, 0))
    content = path.read_bytes()
    at = content.index(b'IDAT') - 4
    path.write_bytes(content[:at] + chunk(b'eXIf', b'none') + content[at:])
    assert note_with(load(str(folder), cache), 'metadata').startswith('1 of 16 images have damaged metadata')


def test_the_fingerprint_is_that_of_names_and_contents_alone(folder, cache, tmp_path):
    first = load(str(folder), cache).fingerprint
    for path in folder.rglob('*'):
        os.utime(path, (1, 1))
    moved = folder.rename(tmp_path / 'moved')
    assert load(str(moved), cache).fingerprint == first
    write(moved / 'dog' / '0.png', (1, 255, 0))  # of the size that it had
    later = load(str(moved), cache).fingerprint
    assert {name for name in first if first[name] != later[name]} <= {
        'train images of class dog',
        'test images of class dog',
    }
    assert later != first


def test_a_start_reads_no_image_of_a_folder_that_is_prepared(folder, cache):
    first = load(str(folder), cache).fingerprint
    for path in folder.rglob('*.png'):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(str(folder), cache).fingerprint == first


def test_another_copy_beside_the_prepared_ones_stays(folder, cache):
    load(str(folder), cache)
    (home,) = cache.glob('image_folders/pets-*')
    kept = home.rename(home.with_name(f'{home.name}.bak'))
    change_a_file(folder)
    load(str(folder), cache)
    assert kept.exists()


def test_an_unchanged_folder_is_not_prepared_again(folder, cache):
    load(str(folder), cache)
    (copy,) = cache.glob('image_folders/pets-*/*/*/features.json')
    before = copy.stat().st_mtime_ns
    load(str(folder), cache)
    assert copy.stat().st_mtime_ns == before


def test_an_interrupted_preparation_is_begun_again(folder, cache):
    load(str(folder), cache)
    (copy,) = cache.glob('image_folders/pets-*/*/2.0.0')
    left = copy.rename(copy.with_name('incomplete.4XT2QG_2.0.0'))
    kept = copy.with_name('incomplete.notes')
    kept.mkdir()
    assert len(load(str(folder), cache).train) == 12
    assert copy.exists()
    assert not left.exists()
    assert kept.exists()


def test_images_of_another_size_are_resized_to_the_most_common_one(folder, cache):
    write(folder / 'cat' / 'large.png', (200, 0, 0), size=(12, 8))
    for _ in ('prepared', 'read again'):
        dataset = load(str(folder), cache)
        assert dataset.image_shape == (4, 6, 3)
        assert note_with(dataset, 'stretched') == '1 of 16 images were stretched to 6x4 pixels'
        images, _ = all_of(dataset)
        assert (images == [200, 0, 0]).all(axis=(1, 2, 3)).sum() == 1


def test_images_without_a_common_size_are_resized_to_a_small_one(tmp_path, cache):
    for number in range(1, 7):
        write(tmp_path / 'own' / f'{number % 2}' / f'{number}.png', (number, 0, 0), size=(10 * number, 300))
    dataset = load(str(tmp_path / 'own'), cache)
    assert dataset.image_shape == (64, 64, 3)
    assert note_with(dataset, 'stretched') == '6 of 6 images were stretched to 64x64 pixels'


def test_grey_images_stay_grey(tmp_path, cache):
    for number in range(4):
        write(tmp_path / 'own' / f'{number % 2}' / f'{number}.png', 100 + number, mode='L')
    dataset = load(str(tmp_path / 'own'), cache)
    assert dataset.image_shape == (4, 6, 1)
    images, _ = all_of(dataset)
    assert sorted(images[:, 0, 0, 0]) == [100, 101, 102, 103]


def test_grey_images_among_coloured_ones_become_coloured(folder, cache):
    write(folder / 'cat' / 'grey.png', 123, mode='L')
    dataset = load(str(folder), cache)
    assert dataset.image_shape == (4, 6, 3)
    assert note_with(dataset, 'grey').startswith('1 of 16 images are grey')
    images, _ = all_of(dataset)
    assert (images == 123).all(axis=(1, 2, 3)).sum() == 1


@pytest.mark.parametrize(
    ('mode', 'color', 'expected', 'transparent'),
    [
        ('RGBA', (0, 0, 0, 0), (255, 255, 255), True),
        ('RGBA', (10, 20, 30, 255), (10, 20, 30), False),
        ('LA', (0, 0), (255, 255, 255), True),
        ('P', 0, (0, 0, 0), False),
        ('1', 1, (255, 255, 255), False),
        ('I;16', 256 * 77, (77, 77, 77), False),
    ],
)
def test_other_kinds_of_pixels_have_a_stated_outcome(folder, cache, mode, color, expected, transparent):
    write(folder / 'cat' / 'other.png', color, mode=mode)
    dataset = load(str(folder), cache)
    images, labels = all_of(dataset)
    cats = sorted(tuple(image[0, 0]) for image in images[labels == 0])
    assert cats == sorted([*((number, 0, 0) for number in range(10)), expected])
    assert any('1 of 16 images have transparent parts' in note for note in dataset.notes) == transparent


def test_a_colour_that_a_file_declares_transparent_is_laid_on_white(folder, cache):
    Image.new('RGB', (6, 4), (1, 2, 3)).save(folder / 'cat' / 'hole.png', transparency=(1, 2, 3))
    images, _ = all_of(load(str(folder), cache))
    assert (images == 255).all(axis=(1, 2, 3)).sum() == 1
    assert not (images == [1, 2, 3]).all(axis=-1).any()


@pytest.mark.parametrize(('orientation', 'size', 'corner'), [(3, (6, 4), [3, 5]), (6, (4, 6), [0, 5])])
def test_a_photo_is_turned_upright_as_its_camera_says(folder, cache, orientation, size, corner):
    image = Image.new('RGB', size)
    image.putpixel((0, 0), (9, 9, 9))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(folder / 'cat' / 'photo.png', exif=exif)
    dataset = load(str(folder), cache)
    assert not any('stretched' in note for note in dataset.notes)
    images, _ = all_of(dataset)
    assert np.argwhere((images == [9, 9, 9]).all(axis=-1))[:, 1:].tolist() == [corner]


def test_unreadable_files_are_named_and_nothing_is_prepared(folder, cache):
    for number in range(5):
        (folder / 'cat' / f'broken{number}.png').write_bytes(b'no image')
    for _ in ('first', 'again'):
        with pytest.raises(DataError, match=r'5 images in .* cannot be read') as error:
            load(str(folder), cache)
        message = str(error.value)
        assert 'cat/broken0.png: ' in message
        assert 'and 2 more' in message
        assert len(message.splitlines()) <= 10
        assert '--skip-unreadable' in message
    assert not list(cache.rglob('*.array_record*'))


def test_unreadable_files_may_be_left_out_with_a_list(folder, cache):
    for number in range(5):
        (folder / 'cat' / f'broken{number}.png').write_bytes(b'no image')
    (folder / 'bird').mkdir()
    (folder / 'bird' / 'broken.png').touch()
    for _ in ('prepared', 'read again'):
        dataset = load(str(folder), cache, skip_unreadable=True)
        assert dataset.class_names == ('cat', 'dog')
        assert (counts(dataset.train).tolist(), counts(dataset.test).tolist()) == ([8, 4], [2, 1])
        at = dataset.notes.index('6 images cannot be read and are left out:')
        names = [line.partition(':')[0] for line in dataset.notes[at + 1 : at + 7]]
        assert names == ['  bird/broken.png', *(f'  cat/broken{number}.png' for number in range(5))]
        with pytest.raises(DataError, match='--skip-unreadable'):
            load(str(folder), cache)
    for path in folder.glob('*/broken*'):
        path.unlink()
    assert load(str(folder), cache).fingerprint == dataset.fingerprint


def test_a_file_cut_short_and_a_broken_link_are_unreadable(folder, cache):
    cut = write(folder / 'dog' / 'cut.jpg', (1, 2, 3), size=(60, 40))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    os.symlink(folder / 'nowhere', folder / 'cat' / 'link.png')
    with pytest.raises(DataError, match='2 images in') as error:
        load(str(folder), cache)
    assert 'dog/cut.jpg' in str(error.value)
    assert 'cat/link.png' in str(error.value)


def test_the_only_image_of_a_class_is_a_train_image(folder, cache):
    write(folder / 'bird' / 'only.png', (1, 2, 3))
    dataset = load(str(folder), cache)
    assert dataset.class_names == ('bird', 'cat', 'dog')
    assert counts(dataset.train).tolist() == [1, 8, 4]
    assert counts(dataset.test).tolist() == [0, 2, 1]
    assert note_with(dataset, 'single image').endswith('bird')


def test_files_that_are_left_out_are_said(folder, cache):
    write(folder / 'loose.png', (1, 2, 3))
    write(folder / 'cat' / 'deeper' / '0.png', (1, 2, 3))
    (folder / 'cat' / 'notes.txt').touch()
    (folder / 'cat' / '.hidden.png').touch()
    dataset = load(str(folder), cache)
    assert (len(dataset.train), len(dataset.test)) == (12, 3)
    assert note_with(dataset, 'left out').endswith('cat/deeper/0.png, cat/notes.txt, loose.png')


def test_classes_without_train_images_are_an_error_and_classes_without_test_images_are_named(tmp_path, cache):
    for name in ('train/a', 'train/b', 'train/c', 'test/a', 'test/d'):
        write(tmp_path / 'own' / name / '0.png', (1, 2, 3))
    with pytest.raises(DataError, match=r'classes in test/ that train/ lacks: test/d; add train images'):
        load(str(tmp_path / 'own'), cache)
    (tmp_path / 'own' / 'test' / 'd').rename(tmp_path / 'd')
    dataset = load(str(tmp_path / 'own'), cache)
    assert dataset.class_names == ('a', 'b', 'c')
    assert (counts(dataset.train).tolist(), counts(dataset.test).tolist()) == ([1, 1, 1], [1])
    assert dataset.notes == ('2 of 3 classes have train images but no test images: b, c',)


@pytest.mark.parametrize('files', [[], ['0.png'], ['a/0.png', 'a/1.png'], ['a/b/0.png', 'c/d/0.png']])
def test_a_folder_without_two_classes_is_an_error_that_shows_the_layout(tmp_path, cache, files):
    (tmp_path / 'own').mkdir()
    for file in files:
        write(tmp_path / 'own' / file, (1, 2, 3))
    with pytest.raises(DataError, match='at least two classes') as error:
        load(str(tmp_path / 'own'), cache)
    assert 'class/*.png|jpg|jpeg|webp' in str(error.value)


def test_a_folder_with_nothing_to_test_on_is_an_error(tmp_path, cache):
    for name in ('a', 'b'):
        write(tmp_path / 'own' / name / '0.png', (1, 2, 3))
    with pytest.raises(DataError, match='no class with two images'):
        load(str(tmp_path / 'own'), cache)


def test_a_folder_with_the_name_of_a_set_is_reached_by_a_path(tmp_path, cache, folder, monkeypatch):
    folder.rename(tmp_path / 'digits')
    monkeypatch.chdir(tmp_path)
    assert load('./digits', cache).class_names == ('cat', 'dog')
    assert load('digits', cache).num_classes == 10

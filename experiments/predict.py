"""Labels images with a trained network: the class of the nearest center, or `unknown` if the distance is too large.

The threshold is the distance within which 95 % of the test examples of known classes lie. The run has stored it.
predictions.csv and a contact sheet, predictions.png, are written to --out.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.data.splits import Split, pixels
from experiments.launch import cli
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import DataError, RunError
from experiments.launch.flags import DeviceFlags, Folder, OptionalFolder

UNKNOWN = 'unknown'
_TABLE, _PICTURE = 'predictions.csv', 'predictions.png'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelling:
    """Images, the network that labels them, and where the predictions go."""

    images: str
    """a folder with PNG or JPEG files at any depth, or a split of a dataset, such as digits:test"""
    run: Folder = Path('runs/toy2d')
    """folder of a finished run of experiments.toy2d or experiments.verification"""
    arm: str = ''
    """arm of the run, such as softmax or center-3; by default the first one with center loss"""
    data_dir: OptionalFolder = None
    """folder of the prepared datasets; by default $XDG_CACHE_HOME/centerloss_jax or ~/.cache/centerloss_jax"""
    out: OptionalFolder = None
    """folder for the predictions; by default predictions in --run, where earlier ones are replaced"""
    overwrite: bool = False
    """replace the predictions in --out"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, Labelling):
    """Settings of a labelling."""

    parallel: Literal['auto', 'none'] = 'auto'
    """auto splits the images over all devices, none uses only the first device"""


def main(config: Config) -> None:
    from experiments.launch import output, processes
    from experiments.launch.run_folder import CHECKPOINTS, read_config
    from experiments.plots.contact_sheet import draw_contact_sheet
    from experiments.train.evaluate import embed, nearest
    from experiments.train.thresholds import read_known

    console = output.console()
    tell = partial(console.print, highlight=False, soft_wrap=True)
    class_names, thresholds = read_known(config.run)
    arm = config.arm or next((arm for arm in thresholds if arm.startswith('center')), '')
    if arm not in thresholds:
        raise RunError(f'--arm {arm} is not in {config.run}, which has {", ".join(thresholds)}')
    settings = read_config(config.run, 'image_shape', 'num_classes')
    out = _folder(config)
    names, split = _images(config, settings['image_shape'], tell)
    devices = config.start()
    state = restored(settings, config.run / CHECKPOINTS / arm, arm)
    features, _, _ = embed(state, split, devices)
    if not processes.is_main_process():
        return
    classes, distances = nearest(state, features)
    unknown = ~(distances <= thresholds[arm])  # a NaN is unknown too
    rows = [
        {
            'image': name,
            'label': UNKNOWN if far else class_names[index],
            'nearest': class_names[index],
            'distance': float(distance),
        }
        for name, index, distance, far in zip(names, classes, distances, unknown, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / _TABLE, rows)
    captions = [f'{row["label"][:14]}\n{row["distance"]:.3g}' for row in rows]
    title = f'{config.images}: nearest center and distance, unknown beyond {thresholds[arm]:.3g}'
    draw_contact_sheet(out / _PICTURE, split.images, captions, unknown, title=title)
    tell(f'{len(rows)} images, {unknown.sum()} of them unknown; wrote {out / _PICTURE}')


def _folder(config: Config) -> Path:
    """Returns the folder for the predictions. In a folder that --out names, only --overwrite replaces earlier ones."""
    from experiments.launch import processes
    from experiments.launch.run_folder import check_folder

    out = config.out or config.run / 'predictions'
    if processes.is_main_process():
        check_folder(out)
    taken = [name for name in (_TABLE, _PICTURE) if (out / name).exists()]
    if taken and config.out and not config.overwrite:
        raise RunError(f'--out {out} holds {taken[0]}; name another folder, or pass --overwrite to replace it')
    return out


def restored(settings: dict[str, Any], folder: Path, arm: str = '') -> Any:
    """Restores the parameters and centers of an arm, without the state of the optimizer."""
    from experiments.launch.mesh import choose
    from experiments.train.checkpoint import saved_params
    from experiments.train.model import Classifier
    from experiments.train.step import create_state

    saved = saved_params(folder, arm)
    model = Classifier(settings['model'], settings['feature_dim'], settings['num_classes'])
    state = create_state(model, tuple(settings['image_shape']), 0, 1.0, 0.0, choose('none'))
    return state.replace(params=saved)


def _images(config: Config, image_shape: list[int], tell: Callable[[str], None]) -> tuple[list[str], Split]:
    """Returns the names of all images, and their pixels in the shape of the network's input, without labels."""
    from experiments.data.image_files import notes_on, shown, walk
    from experiments.data.load import load

    if not config.images:
        raise DataError('--images is empty; for the current directory pass .')
    height, width, channels = image_shape
    folder = Path(config.images).expanduser()
    if folder.is_dir():
        paths, others = walk(folder)
        if not paths:
            raise DataError(f'{shown(folder)} holds no *.png, *.jpg or *.jpeg')
        for note in notes_on(folder, others, '*.png|jpg|jpeg'):
            tell(note)
        images = np.stack([_read_image(path, (height, width, channels)) for path in paths])
        return [shown(path.relative_to(folder)) for path in paths], _unlabelled(images)
    dataset, colon, part = config.images.rpartition(':')
    if not colon or part not in ('train', 'test'):
        raise DataError(f'--images must be a folder, or a dataset followed by :train or :test, got {config.images}')
    data = load(dataset, config.data_dir, width if width == height else 0)
    if list(data.image_shape) != image_shape:
        raise RunError(
            f'images of {dataset} are {list(data.image_shape)}, but {config.run} was trained on {image_shape}'
        )
    split = getattr(data, part)
    return [f'{config.images}:{index}' for index in range(len(split))], _unlabelled(split.take(range(len(split)))[0])


def _unlabelled(images: np.ndarray) -> Split:
    return Split(images, np.full(len(images), -1, np.int32))


def _read_image(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    from experiments.data.image_files import shown
    from experiments.data.image_folder import open_image

    try:
        image, _, _ = open_image(path)
    except Exception as error:  # Pillow has about ten types of errors
        raise DataError(f'{shown(path)} cannot be read; repair or remove it: {error}') from error
    return pixels(image, image_shape)


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.predict')

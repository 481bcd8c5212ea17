"""Labels images by a trained run: the class of the nearest center, its distance, and `unknown` where that is too far.

Too far is what lies beyond 95 % of the test examples of known classes, as the run stored it. Writes predictions.csv and
a contact sheet, predictions.png.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from experiments.data.image_files import SUFFIXES
from experiments.data.image_folder import open_image
from experiments.data.load import load
from experiments.data.splits import Split, pixels
from experiments.data.tfds_cache import DataError
from experiments.launch import cli, processes
from experiments.launch.atomic_files import write_table
from experiments.launch.flags import DeviceFlags, Folder, OptionalFolder
from experiments.launch.mesh import choose
from experiments.launch.run_folder import CHECKPOINTS, CONFIG, RunError, check_folder, read_json
from experiments.plots.contact_sheet import draw_contact_sheet
from experiments.train.checkpoint import saved_params
from experiments.train.evaluate import embed, nearest
from experiments.train.model import Classifier
from experiments.train.step import create_state
from experiments.train.thresholds import read_known

UNKNOWN = 'unknown'
_TABLE, _PICTURE = 'predictions.csv', 'predictions.png'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags):
    """What is labelled by what."""

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
    parallel: Literal['auto', 'none'] = 'auto'
    """auto splits the images over all devices, none uses only the first device"""


def main(config: Config) -> None:
    console = Console(quiet=not processes.is_main_process())
    class_names, reach = read_known(config.run)
    arm = config.arm or next((arm for arm in reach if arm.startswith('center')), '')
    if arm not in reach:
        raise RunError(f'--arm {arm} is not in {config.run}, which has {", ".join(reach)}')
    settings = read_json(config.run / CONFIG)
    out = _folder(config)
    names, split = _images(config, settings['image_shape'])
    devices = config.start()
    state = restored(settings, config.run / CHECKPOINTS / arm, arm)
    features, _, _ = embed(state, split, devices)
    if not processes.is_main_process():
        return
    classes, distances = nearest(state, features)
    unknown = ~(distances <= reach[arm])
    found = [UNKNOWN if far else class_names[own] for own, far in zip(classes, unknown, strict=True)]
    rows = [
        {'image': name, 'label': label, 'nearest': class_names[own], 'distance': float(distance)}
        for name, label, own, distance in zip(names, found, classes, distances, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / _TABLE, rows)
    captions = [f'{row["label"][:14]}\n{row["distance"]:.3g}' for row in rows]
    title = f'{config.images}: nearest center and distance, unknown beyond {reach[arm]:.3g}'
    draw_contact_sheet(out / _PICTURE, split.images, captions, unknown, title=title)
    text = f'{len(rows)} images, {unknown.sum()} of them unknown; {out / "predictions.png"} shows them'
    console.print(text, highlight=False, soft_wrap=True)


def _folder(config: Config) -> Path:
    """Where the predictions go. In a folder of the user's own choice nothing is replaced unasked."""
    out = config.out or config.run / 'predictions'
    if processes.is_main_process():
        check_folder(out)
    taken = [name for name in (_TABLE, _PICTURE) if (out / name).exists()]
    if taken and config.out and not config.overwrite:
        raise RunError(f'--out {out} holds {taken[0]}; name another folder, or pass --overwrite to replace it')
    return out


def restored(settings: dict[str, Any], folder: Path, arm: str) -> Any:
    """The state of a run's arm as far as it is needed to label images: no optimizer is read."""
    saved = saved_params(folder, arm)
    model = Classifier(settings['model'], settings['feature_dim'], settings['num_classes'])
    state = create_state(model, tuple(settings['image_shape']), 0, 1.0, 0.0, choose('none'))
    return state.replace(params=saved)


def _images(config: Config, image_shape: list[int]) -> tuple[list[str], Split]:
    """Names and pixels of all images, in the shape that the network was trained on; their labels are not asked for."""
    if not config.images:
        raise DataError("--images is '', which names nothing; for those of the current directory give .")
    height, width, channels = image_shape
    folder = Path(config.images).expanduser()
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f'{folder} holds no *.png, *.jpg or *.jpeg')
        images = np.stack([_read(path, (height, width, channels)) for path in paths])
        return [str(path.relative_to(folder)) for path in paths], _unlabelled(images)
    dataset, colon, part = config.images.rpartition(':')
    if not colon or part not in ('train', 'test'):
        raise DataError(f'--images must be a folder, or a dataset with :train or :test behind it, got {config.images}')
    data = load(dataset, config.data_dir, width if width == height else 0)
    if list(data.image_shape) != image_shape:
        raise RunError(
            f'images of {dataset} are {list(data.image_shape)}, but {config.run} was trained on {image_shape}'
        )
    split = getattr(data, part)
    return [f'{config.images}:{place}' for place in range(len(split))], _unlabelled(split.take(range(len(split)))[0])


def _unlabelled(images: np.ndarray) -> Split:
    return Split(images, np.full(len(images), -1, np.int32))


def _read(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    try:
        image, _ = open_image(path)
    except Exception as error:  # Pillow raises some ten types for files that it cannot read
        raise DataError(f'{path} cannot be read; repair or remove it: {error}') from error
    return pixels(image, image_shape)


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.predict')

"""Labels images with a trained network: the class of the nearest center, or `unknown` if the distance is too large.

The threshold is the distance within which 95 % of the test examples of known classes lie. The run has stored it.
predictions.csv and a contact sheet, predictions.png, are written to --out.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.data.splits import Split, pixels
from experiments.launch import cli
from experiments.launch.atomic_files import draft, write_table
from experiments.launch.errors import DataError, RunError
from experiments.launch.flags import NETWORKS, DeviceFlags, Folder, OptionalFile, OptionalFolder

if TYPE_CHECKING:
    from flax import linen as nn

UNKNOWN = 'unknown'
_TABLE, _PICTURE = 'predictions.csv', 'predictions.png'
_SPLITS = 'train', 'test'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelling:
    """Images, the network that labels them, and where the predictions go."""

    images: str
    """a folder with PNG, JPEG or WebP files at any depth; a split of a dataset, such as digits:test; or a .npz file"""
    run: Folder = Path('runs/toy2d')
    """folder of a finished run of experiments.toy2d or experiments.verification"""
    arm: str = ''
    """arm of the run, such as softmax or center-3; by default the first one with center loss"""
    model: str = ''
    """network of the run, package.module:Class, if it is one of your own; no run makes a module be imported"""
    skip_unreadable: bool = False
    """leave out images of a folder that cannot be read, and list them"""
    data_dir: OptionalFolder = None
    """existing folder of the prepared datasets; by default $XDG_CACHE_HOME/centerloss_jax or ~/.cache/centerloss_jax"""
    out: OptionalFolder = None
    """folder for the predictions; by default predictions in --run, where earlier ones are replaced"""
    embeddings: OptionalFile = None
    """also write features, names, nearest classes and distances to this .npz file"""
    overwrite: bool = False
    """replace the predictions in --out, and the file of --embeddings"""


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
    network = _network(config, settings['model'])
    out = _folder(config)
    is_image = settings.get('dtype', 'uint8') == 'uint8'
    names, split = (_images if is_image else _arrays)(config, settings['image_shape'], tell)
    devices = config.start()
    state = restored(settings, config.run / CHECKPOINTS / arm, arm, network)
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
    if config.embeddings:
        with draft(config.embeddings) as file:
            np.savez(
                file,
                features=features.astype(np.float32),
                names=np.array(names),
                nearest=np.array(class_names)[classes],
                distances=distances.astype(np.float32),
            )
        tell(f'wrote {config.embeddings}')
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / _TABLE, rows)
    captions = [f'{row["label"][:14]}\n{row["distance"]:.3g}' for row in rows]
    title = f'{config.images}: nearest center and distance, unknown beyond {thresholds[arm]:.3g}'
    if is_image:
        draw_contact_sheet(out / _PICTURE, split.images, captions, unknown, title=title)
    kind, written = ('images', _PICTURE) if is_image else ('examples', _TABLE)
    tell(f'{len(rows)} {kind}, {unknown.sum()} of them unknown; wrote {out / written}')


def _folder(config: Config) -> Path:
    """Returns the folder for the predictions. Only --overwrite replaces files that --out or --embeddings names."""
    from experiments.launch import processes
    from experiments.launch.run_folder import check_folder

    out = config.out or config.run / 'predictions'
    if processes.is_main_process():
        check_folder(out)
    taken = [name for name in (_TABLE, _PICTURE) if (out / name).exists()]
    if taken and config.out and not config.overwrite:
        raise RunError(f'--out {out} holds {taken[0]}; name another folder, or pass --overwrite to replace it')
    file = config.embeddings
    if file and (file.suffix != '.npz' or file.is_dir() or not file.parent.is_dir()):
        raise RunError(f'--embeddings must be a .npz file in a folder that exists, got {file}')
    if file and file.exists() and not config.overwrite:
        raise RunError(f'--embeddings {file} exists; name another file, or pass --overwrite to replace it')
    return out


def _network(config: Config, saved: str) -> 'str | type[nn.Module]':
    """Returns the network of the run, which only --model may import."""
    from experiments.launch.network import find_network

    if config.model != saved and (config.model or saved not in NETWORKS):
        given = f'--model is {config.model}' if config.model else '--model is missing'
        raise RunError(f'{given}, but {config.run} was trained with --model {saved}; pass that value')
    return find_network(config.model) if config.model else saved


def restored(settings: dict[str, Any], folder: Path, arm: str = '', network: 'str | type[nn.Module]' = '') -> Any:
    """Restores the parameters, collections and centers of an arm, without the state of the optimizer.

    Args:
        settings: The config.json of the run.
        folder: The folder of the saves of the arm.
        arm: The arm, to check that the save is one of it.
        network: The class of a network of the user's, which is not imported for the settings.
    """
    from experiments.launch.mesh import choose
    from experiments.launch.network import check_network
    from experiments.train.checkpoint import saved_state
    from experiments.train.model import Classifier
    from experiments.train.step import create_state

    saved = saved_state(folder, arm)
    model = Classifier(network or settings['model'], settings['feature_dim'], settings['num_classes'])
    image_shape, dtype = tuple(settings['image_shape']), settings.get('dtype', 'uint8')
    check_network(model, image_shape, dtype, settings['model'])
    state = create_state(model, image_shape, 0, 1.0, 0.0, choose('none'), dtype)
    return state.replace(params=saved['params'], collections=saved.get('collections') or {})


def _images(config: Config, image_shape: list[int], tell: Callable[[str], None]) -> tuple[list[str], Split]:
    """Returns the names of all images, and their pixels in the shape of the network's input, without labels."""
    from experiments.data.arrays import is_array_file
    from experiments.data.image_files import IMAGES, notes_on, shown, walk
    from experiments.data.image_folder import open_image
    from experiments.data.load import load

    if not config.images:
        raise DataError('--images is empty; for the current directory pass .')
    height, width, channels = image_shape
    folder = Path(config.images).expanduser()
    if folder.is_dir():
        paths, others = walk(folder)
        if not paths:
            raise DataError(f'{shown(folder)} holds no {IMAGES}')
        for note in notes_on(folder, others, IMAGES):
            tell(note)
        names, images = [], []
        for path in paths:
            name = shown(path.relative_to(folder))
            try:
                image, _, _ = open_image(path)
            except Exception as error:  # Pillow has about ten types of errors
                if not config.skip_unreadable:
                    cure = 'repair or remove it, or pass --skip-unreadable'
                    raise DataError(f'{shown(path)} cannot be read; {cure}: {error}') from error
                tell(f'{name} cannot be read and is left out: {error}')
                continue
            names.append(name)
            images.append(pixels(image, (height, width, channels)))
        if not images:
            raise DataError(f'{shown(folder)} holds no image that can be read')
        return names, _unlabelled(np.stack(images))
    dataset, colon, part = config.images.rpartition(':')
    if is_array_file(config.images) or is_array_file(dataset):
        raise RunError(f'{config.images} has arrays, but {config.run} was trained on images; pass images')
    if not colon or part not in _SPLITS:
        raise DataError(f'--images must be a folder, or a dataset followed by :train or :test, got {config.images}')
    data = load(dataset, config.data_dir, width if width == height else 0, config.skip_unreadable)
    if list(data.image_shape) != image_shape:
        raise RunError(
            f'images of {dataset} are {list(data.image_shape)}, but {config.run} was trained on {image_shape}'
        )
    split = getattr(data, part)
    return [f'{config.images}:{index}' for index in range(len(split))], _unlabelled(split.take(range(len(split)))[0])


def _arrays(config: Config, shape: list[int], tell: Callable[[str], None]) -> tuple[list[str], Split]:
    """Returns names for the examples of a .npz file, and the examples as the run standardizes them, without labels."""
    from experiments.data.arrays import Standardization, is_array_file, read_arrays, read_examples
    from experiments.launch.run_folder import INPUTS

    del tell
    dataset, _, part = config.images.rpartition(':')
    if is_array_file(dataset) and part in _SPLITS:
        x = getattr(read_arrays(Path(dataset).expanduser()), part).images
    elif is_array_file(config.images):
        x = read_examples(Path(config.images).expanduser())
    else:
        raise RunError(f'{config.run} was trained on arrays; pass --images file.npz or file.npz:test')
    if list(x.shape[1:]) != shape:
        raise RunError(
            f'an example of {config.images} has the shape {list(x.shape[1:])}, but {config.run} was trained on {shape}'
        )
    examples = Standardization.read(config.run / INPUTS)(x)
    return [f'{config.images}:{index}' for index in range(len(x))], _unlabelled(examples)


def _unlabelled(images: np.ndarray) -> Split:
    return Split(images, np.full(len(images), -1, np.int32))


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.predict')

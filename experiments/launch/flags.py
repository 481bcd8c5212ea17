"""The flags that several programs share: what is trained, on which devices, and where it is written.

Methods import JAX and the rest of the house when they are called, so that --help and an error in a flag come at once.
A program takes its bases in the order `(DeviceFlags, ...)`: --help lists the fields of the last base first.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from experiments.launch.errors import DataError, FlagError
from experiments.launch.mesh_axes import mesh_sizes

if TYPE_CHECKING:
    from experiments.data.splits import LazySplit, Split
    from experiments.launch.mesh import Devices

# A larger number is infinite in float32, the dtype of all computations.
LARGEST = float(np.finfo(np.float32).max)

# The networks of experiments/train/model.py.
NETWORKS = ('small', 'lenets++')

# A batch may be larger than the train split, up to this size. The missing examples are padding.
LARGEST_PADDED_BATCH = 1024

# Flags that may differ between the processes of one run.
LOCAL = ('coordinator', 'process_id', 'data_dir', 'out')


def flag(name: str) -> str:
    """Returns the flag of a field, such as --data-dir."""
    return '--' + name.replace('_', '-')


def _is_class_name(model: str) -> bool:
    """Returns whether `model` has the form `package.module:Class`."""
    module, _, name = model.partition(':')
    return all(part.isidentifier() for part in (*module.split('.'), name))


def _parse_path(words: list[str]) -> Path:
    if not words[0]:
        raise ValueError("'' is no path; for the current directory give .")
    return Path(words[0])


# Path('') is the current directory, so that an unset shell variable must be found before the dataclass is made.
def _path(metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=_parse_path,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


Folder = Annotated[Path, _path('FOLDER')]
OptionalFolder = Annotated[Path | None, _path('FOLDER')]
OptionalFile = Annotated[Path | None, _path('FILE')]


@dataclasses.dataclass(frozen=True)
class Resumable:
    """What the programs that train do with their flags. It has none of its own, as they come first in --help."""

    PROGRAM: ClassVar[str]
    # Flags that may change on --resume.
    FREE: ClassVar[tuple[str, ...]]

    def decisive(self) -> dict[str, Any]:
        """Returns the flags that affect the results of an epoch, by field name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.FREE}

    def command(self) -> str:
        """Returns the command line of this run."""
        words = ['python', '-m', self.PROGRAM]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            words.append(flag(field.name))
            if isinstance(value, tuple):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
        return shlex.join(words)

    def check_at_least(self, smallest: int, *names: str) -> None:
        """Raises FlagError if one of these fields is below `smallest`."""
        for name in names:
            if getattr(self, name) < smallest:
                raise FlagError(f'{flag(name)} must be at least {smallest}, got {getattr(self, name)}')


@dataclasses.dataclass(frozen=True)
class Common(Resumable):
    """Flags of all programs that train on a dataset."""

    # For the dataset, the fingerprint of the data is compared instead.
    FREE: ClassVar[tuple[str, ...]] = ('dataset', 'skip_unreadable', 'out', 'data_dir', 'epochs', 'overwrite', 'resume')

    dataset: str = 'digits'
    """a dataset of TFDS, such as mnist; digits, which needs no download; a folder of images; or a .npz file"""
    out: Folder = Path('runs')
    """folder for the files of the run"""
    epochs: int = 30
    """number of passes over the train split"""
    data_dir: OptionalFolder = None
    """existing folder of the prepared datasets; by default $XDG_CACHE_HOME/centerloss_jax or ~/.cache/centerloss_jax"""
    image_size: int = 0
    """width and height in pixels to which all images are resized; 0 keeps their size"""
    skip_unreadable: bool = False
    """leave out images of a folder that cannot be read, and list them"""
    model: str = 'small'
    """network: small, a CNN, or an MLP for a .npz file; lenets++ of the paper; or package.module:Class, in Linen"""
    feature_dim: int = 2
    """number of feature dimensions; pictures show 2, by PCA if there are more"""
    batch_size: int = 32
    """number of examples in a step, summed over all devices"""
    images_per_class: int = 0
    """K of P x K batches: each batch has K images of each of batch-size / K classes; 0 shuffles all images"""
    learning_rate: float = 3e-3
    """learning rate of Adam for the parameters of the network; the centers use alpha"""
    seed: int = 0
    """random seed of the initialization and of the order of the examples"""
    overwrite: bool = False
    """delete the run in --out and start a new one"""
    resume: bool = False
    """continue the run in --out, or start it; only --epochs and flags that do not affect results may change"""

    def __post_init__(self):
        self.check_at_least(1, 'feature_dim', 'epochs', 'batch_size')
        if self.model not in NETWORKS and not _is_class_name(self.model):
            raise FlagError(f'--model must be {", ".join(NETWORKS)} or package.module:Class, got {self.model}')
        if not self.dataset:
            raise FlagError("--dataset '' is neither a dataset nor a folder; for the current directory give .")
        for name in ('image_size', 'images_per_class'):
            if getattr(self, name) < 0:
                raise FlagError(f'{flag(name)} must be 0 or more, got {getattr(self, name)}')
        if self.images_per_class and self.batch_size % self.images_per_class:
            raise FlagError(
                f'--batch-size must be a multiple of --images-per-class, got {self.batch_size} and '
                f'{self.images_per_class}'
            )
        if not 0 < self.learning_rate <= LARGEST:
            raise FlagError(f'--learning-rate must be positive and at most {LARGEST:.2g}, got {self.learning_rate}')
        check_run(self.seed, self.resume, self.overwrite)

    def check_data(self, train: 'Split | LazySplit') -> list[str]:
        """Raises DataError if the network cannot be trained on such data. Returns notes on its batches."""
        is_image = train.dtype == np.uint8
        if is_image and self.model in NETWORKS:
            from experiments.train.model import TRUNKS

            channels, _ = TRUNKS[self.model]
            height, width, _ = train.image_shape
            smallest = 2 ** len(channels)
            if min(height, width) < smallest:
                raise DataError(
                    f'images of {self.dataset} are {width}x{height} pixels, but the network {self.model} needs at '
                    f'least {smallest}x{smallest}; pass --image-size {smallest} or more'
                )
        if not is_image and self.model == 'lenets++':
            raise DataError(f'--model lenets++ takes images, but {self.dataset} has arrays; pass --model small')
        if self.batch_size > max(len(train), LARGEST_PADDED_BATCH):
            raise DataError(
                f'--batch-size is {self.batch_size}, but {self.dataset} has only {len(train)} train examples; '
                'pass at most that many'
            )
        each = self.images_per_class
        if not each:
            return []
        _, counts = np.unique(train.labels[train.labels >= 0], return_counts=True)
        classes = len(counts)
        if self.batch_size > each * classes:
            raise DataError(
                f'--batch-size {self.batch_size} with --images-per-class {each} is {self.batch_size // each} classes a '
                f'batch, but {self.dataset} has only {classes} to train on; pass a --batch-size of at most '
                f'{each * classes}, or a larger --images-per-class'
            )
        few = int((counts < each).sum())
        return [f'{few} of {classes} classes have fewer than {each} train images; a batch repeats them'] if few else []


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """Flags of all programs that compute: which devices they use, and in how many processes."""

    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """auto uses all devices by jax.jit over a mesh, pmap all devices by jax.pmap, none only the first device"""
    mesh: str | None = None
    """axes of the mesh, such as data=2,classes=4; classes splits the rows of the centers; default: one axis, data"""
    distributed: bool = False
    """run as one of several processes that JAX detects under Slurm, GKE, MPI or on a TPU pod"""
    coordinator: str | None = None
    """run as one of several processes that connect to HOST:PORT of process 0, where JAX cannot detect them"""
    num_processes: int | None = None
    """with --coordinator: number of processes"""
    process_id: int | None = None
    """with --coordinator: index of this process, from 0"""

    def __post_init__(self):
        named = {'--coordinator': self.coordinator, '--num-processes': self.num_processes}
        named['--process-id'] = self.process_id
        missing = [flag for flag, value in named.items() if value is None]
        if 0 < len(missing) < len(named):
            raise FlagError(f'{", ".join(named)} must be given together; missing: {", ".join(missing)}')
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(':')
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise FlagError(f'--coordinator must be HOST:PORT, got {self.coordinator}')
        if self.num_processes is not None and self.num_processes < 1:
            raise FlagError(f'--num-processes must be at least 1, got {self.num_processes}')
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise FlagError(f'--process-id must be from 0 to {(self.num_processes or 0) - 1}, got {self.process_id}')
        if self.mesh is not None:
            mesh_sizes(self.mesh)
        if self.parallel != 'auto':
            for flag, given in (('--mesh', self.mesh), ('--distributed', self.distributed), *named.items()):
                if given:
                    raise FlagError(f'{flag} requires --parallel auto; remove --parallel {self.parallel}')

    def initialize(self) -> None:
        """Starts `jax.distributed` if the flags ask for it, and checks that all processes have the same flags.

        Call it before anything else uses a device.
        """
        if self.distributed or self.coordinator is not None:
            from experiments.launch import processes

            processes.initialize(self.coordinator, self.num_processes, self.process_id)
            settings = dataclasses.asdict(self)
            processes.check_same({flag(name): value for name, value in settings.items() if name not in LOCAL})

    def start(self) -> 'Devices':
        """Returns the devices of all processes that the flags select."""
        from experiments.launch.mesh import choose

        return choose(self.parallel, self.mesh)


@dataclasses.dataclass(frozen=True)
class Comparison(Common):
    """Flags of the programs that compare softmax alone with center loss."""

    center_weight: float = 0.1
    """weight lambda of the center loss in the center arm, at least 0; the softmax arm has 0"""
    alpha: float = 0.5
    """step size of the centers (Eq. 4), from 0 to 1"""
    save_every: float = 60.0
    """seconds between saves; each arm is always saved at its end"""
    tensorboard: bool = False
    """also write the metrics as TensorBoard event files"""
    profile: bool = False
    """write a jax.profiler trace of a few steps"""

    def __post_init__(self):
        super().__post_init__()
        check_weight(self.center_weight, '--center-weight')
        check_alpha(self.alpha, '--alpha')
        if not self.save_every >= 0:
            raise FlagError(f'--save-every must be 0 or more, got {self.save_every}')


@dataclasses.dataclass(frozen=True)
class HeldOut(Common):
    """Flags of the programs that evaluate features on classes held out of training."""

    feature_dim: int = 64
    """number of feature dimensions"""
    seed: int = 0
    """first random seed of the initialization and of the order of the examples"""
    seeds: int = 5
    """number of seeds to train with"""
    held_out: str = ''
    """classes to verify: names, 7-9, 0,4-6, or a fraction; by default classes only in the test split, or 0.3"""
    similarity: Literal['cosine', 'euclidean'] = 'cosine'
    """similarity of a pair: the cosine, as in the paper, or the negative Euclidean distance"""

    def __post_init__(self):
        super().__post_init__()
        self.check_at_least(1, 'seeds')


@dataclasses.dataclass(frozen=True)
class Settings(DeviceFlags, Comparison):
    """Flags of a comparison, and the devices that it runs on."""

    FREE: ClassVar[tuple[str, ...]] = (
        *Common.FREE,
        *(field.name for field in dataclasses.fields(DeviceFlags)),
        *('save_every', 'tensorboard', 'profile'),
    )

    def __post_init__(self):
        DeviceFlags.__post_init__(self)
        Comparison.__post_init__(self)


def check_run(seed: int, resume: bool, overwrite: bool) -> None:
    """Raises FlagError if the seed is no key, or if a run is to be continued and replaced."""
    if not 0 <= seed < 2**32:
        raise FlagError(f'--seed must be in [0, 2**32), got {seed}')
    if resume and overwrite:
        raise FlagError('--resume continues a run and --overwrite replaces it; pass only one of them')


def check_weight(value: float, name: str) -> None:
    """Raises FlagError if a weight of the center loss is negative or infinite in float32."""
    if not 0 <= value <= LARGEST:
        raise FlagError(f'{name} must be from 0 to {LARGEST:.2g}, got {value}')


def check_alpha(value: float, name: str) -> None:
    """Raises FlagError if a step size of the centers is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise FlagError(f'{name} must be in [0, 1], got {value}')

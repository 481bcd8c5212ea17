"""What an experiment can be asked: the flags that all of them have, checked, and the command line of a run."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import simple_parsing

from experiments.data.tfds_cache import DataError
from experiments.launch import processes
from experiments.launch.mesh import Devices, choose, mesh_sizes
from experiments.train.model import TRUNKS

# Beyond it a number is infinite in float32, in which all is computed.
LARGEST = float(np.finfo(np.float32).max)

# A set may be smaller than a batch, which is filled up then. Beyond this size that would only cost memory.
FILLED_UP = 1024


def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


@dataclasses.dataclass(frozen=True)
class Common:
    """What is trained, on what, and where it is written."""

    PROGRAM: ClassVar[str]
    # Of a run that is resumed these may be others: they say how and where, but not what comes out. So may --epochs.
    FREE: ClassVar[tuple[str, ...]] = ('dataset', 'out', 'data_dir', 'epochs', 'overwrite', 'resume')

    dataset: str = 'digits'
    """a TFDS name such as mnist, fashion_mnist or cifar10; digits, which needs no download; or a folder of images"""
    data_dir: Path | None = None
    """where prepared sets are and go; by default $XDG_CACHE_HOME/centerloss_jax or ~/.cache/centerloss_jax"""
    image_size: int = 0
    """width and height that all images are brought to, in pixels; 0 leaves them as they are"""
    out: Path = Path('runs')
    """folder that the run is written to"""
    model: Literal['small', 'lenets++'] = 'small'
    """network: a small CNN, or the paper's LeNets++, which is slow on a CPU"""
    feature_dim: int = 2
    """number of feature dimensions; other than 2 they are drawn by a PCA"""
    epochs: int = 30
    """passes over the train set"""
    batch_size: int = 32
    """examples in a step, over all devices together"""
    learning_rate: float = 3e-3
    """step size of Adam, for the parameters; the centers have alpha"""
    seed: int = 0
    """what the initialization and the order of the examples are drawn from"""
    overwrite: bool = simple_parsing.field(default=False, action='store_true')
    """replace the run that --out holds"""
    resume: bool = simple_parsing.field(default=False, action='store_true')
    """go on with the run that --out holds, or start it; --epochs may be raised, and flags that say only how and where,
    such as --parallel, --save-every and --data-dir, may be others"""

    def __post_init__(self):
        for name in ('feature_dim', 'epochs', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')
        if not self.dataset:
            raise ValueError("--dataset is '', which names nothing; for the images of the current directory give .")
        if self.image_size < 0:
            raise ValueError(f'--image-size must be 0 or more, got {self.image_size}')
        if not 0 < self.learning_rate <= LARGEST:
            raise ValueError(f'--learning-rate must be positive and at most {LARGEST:.2g}, got {self.learning_rate}')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f'--seed must be in [0, 2**32), got {self.seed}')
        if self.resume and self.overwrite:
            raise ValueError('--resume goes on with a run and --overwrite replaces it; pass one of them')

    def check_data(self, train_examples: int, image_shape: tuple[int, ...]) -> None:
        """Raises DataError if the network cannot be trained on this data."""
        channels, _ = TRUNKS[self.model]
        height, width, _ = image_shape
        smallest = 2 ** len(channels)
        if min(height, width) < smallest:
            raise DataError(
                f'images of {self.dataset} are {width}x{height} pixels, but the network {self.model} needs '
                f'{smallest}x{smallest} or more; pass --image-size {smallest} or more'
            )
        if self.batch_size > max(train_examples, FILLED_UP):
            raise DataError(
                f'--batch-size is {self.batch_size}, but {self.dataset} has only {train_examples} train examples; '
                'give that many or fewer'
            )

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what comes out of an epoch."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.FREE}

    def command(self) -> str:
        """The command line that makes this run again."""
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


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """Flags for one device, several, or those of several processes. An experiment's settings are a subclass."""

    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """devices: auto is all by jit over a mesh, pmap all by jax.pmap, none the first alone"""
    mesh: str | None = None
    """a mesh such as data=2,classes=4, in place of auto's data=8: examples lie over all of its devices, the rows of the
    centers over the axis classes"""
    distributed: bool = simple_parsing.field(default=False, action='store_true')
    """be one of several processes, which jax.distributed finds under Slurm, GKE, MPI and on TPU pods"""
    coordinator: str | None = None
    """be one of several processes, which meet at HOST:PORT of process 0, where JAX cannot find them itself"""
    num_processes: int | None = None
    """with --coordinator: how many there are"""
    process_id: int | None = None
    """with --coordinator: which one this is, from 0"""

    def __post_init__(self):
        named = {'--coordinator': self.coordinator, '--num-processes': self.num_processes}
        named['--process-id'] = self.process_id
        missing = [flag for flag, value in named.items() if value is None]
        if 0 < len(missing) < len(named):
            raise ValueError(f'{", ".join(named)} go together; {" and ".join(missing)} is missing')
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(':')
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f'--coordinator must be HOST:PORT, got {self.coordinator}')
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f'--num-processes must be at least 1, got {self.num_processes}')
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise ValueError(f'--process-id must be from 0 to {(self.num_processes or 0) - 1}, got {self.process_id}')
        if self.mesh is not None:
            mesh_sizes(self.mesh)
        if self.parallel != 'auto':
            for flag, given in (('--mesh', self.mesh), ('--distributed', self.distributed), *named.items()):
                if given:
                    raise ValueError(f'{flag} goes with --parallel auto alone; leave out --parallel {self.parallel}')

    def join(self) -> None:
        """Makes this process one of several, if it is to be. Nothing may ask JAX for a device before."""
        if self.distributed or self.coordinator is not None:
            processes.join(self.coordinator, self.num_processes, self.process_id)

    def start(self) -> Devices:
        """The devices, those of all processes together."""
        return choose(self.parallel, self.mesh)


@dataclasses.dataclass(frozen=True)
class Settings(Common, DeviceFlags):
    """And how its arms are trained, saved and measured."""

    FREE: ClassVar[tuple[str, ...]] = (
        *Common.FREE,
        *(field.name for field in dataclasses.fields(DeviceFlags)),
        *('save_every', 'tensorboard', 'profile'),
    )

    center_weight: float = 0.1
    """weight lambda of the center loss in the center arm, 0 or more; the softmax arm has 0"""
    alpha: float = 0.5
    """step of the centers, Eq. 4, in [0, 1]"""
    save_every: float = 60.0
    """seconds between saves; each arm is saved at its end in any case"""
    tensorboard: bool = simple_parsing.field(default=False, action='store_true')
    """write the metrics as TensorBoard event files too"""
    profile: bool = simple_parsing.field(default=False, action='store_true')
    """write a jax.profiler trace of a few steps after the first ones"""

    def __post_init__(self):
        Common.__post_init__(self)
        DeviceFlags.__post_init__(self)
        check_weight(self.center_weight, '--center-weight')
        check_alpha(self.alpha, '--alpha')
        if not self.save_every >= 0:
            raise ValueError(f'--save-every must be 0 or more, got {self.save_every}')


def check_weight(value: float, name: str) -> None:
    if not 0 <= value <= LARGEST:
        raise ValueError(f'{name} must be from 0 to {LARGEST:.2g}, got {value}')


def check_alpha(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must be in [0, 1], got {value}')

"""What an experiment can be asked: the flags that all of them have, checked, and the command line of a run."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any, ClassVar, Literal

import simple_parsing

from experiments.where import Where


def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


@dataclasses.dataclass(frozen=True)
class Common:
    """What is trained, on what, and where it is written."""

    PROGRAM: ClassVar[str]
    # Of a run that is resumed these may be others: they say how and where, but not what comes out. So may --epochs.
    FREE: ClassVar[tuple[str, ...]] = ('out', 'data_dir', 'epochs', 'overwrite', 'resume')

    dataset: str = 'digits'
    """a TFDS name such as mnist, fashion_mnist or cifar10; digits, which needs no download; or a folder of images"""
    data_dir: Path | None = None
    """where prepared sets are and go; by default a folder in the user's cache"""
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
    """of Adam, for the parameters; the centers have alpha"""
    seed: int = 0
    """of the initialization and of the order of the examples"""
    overwrite: bool = simple_parsing.field(default=False, action='store_true')
    """replace the run that --out holds"""
    resume: bool = simple_parsing.field(default=False, action='store_true')
    """go on with the run that --out holds, or start it; only --epochs may be another"""

    def __post_init__(self):
        for name in ('feature_dim', 'epochs', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')
        if not self.dataset:
            raise ValueError("--dataset is '', which names nothing; for the images of the current directory give .")
        if self.image_size < 0:
            raise ValueError(f'--image-size must be 0 or more, got {self.image_size}')
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f'--learning-rate must be a positive number, got {self.learning_rate}')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f'--seed must be in [0, 2**32), got {self.seed}')
        if self.resume and self.overwrite:
            raise ValueError('--resume goes on with a run and --overwrite replaces it; pass one of them')

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
class Settings(Common, Where):
    """And how its arms are trained, saved and measured."""

    FREE: ClassVar[tuple[str, ...]] = (
        *Common.FREE,
        *(field.name for field in dataclasses.fields(Where)),
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
        Where.__post_init__(self)
        check_weight(self.center_weight, '--center-weight')
        check_alpha(self.alpha, '--alpha')
        if not self.save_every >= 0:
            raise ValueError(f'--save-every must be 0 or more, got {self.save_every}')


def check_weight(value: float, name: str) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f'{name} must be 0 or more, got {value}')


def check_alpha(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must be in [0, 1], got {value}')

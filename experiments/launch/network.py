"""The network of a run: one by name, or the class of the user's that `--model package.module:Class` imports.

Only a flag names a module to import. The files of a run never do.
"""

import difflib
import importlib
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.launch.errors import FlagError
from experiments.train.model import TRUNKS, Classifier
from experiments.train.step import initial_variables


def find_network(model: str) -> str | type[nn.Module]:
    """Returns the name of a trunk, or imports the class that `--model` names.

    Raises:
        FlagError: if the module or the class cannot be imported, or if the class is no Linen module.
    """
    if model in TRUNKS:
        return model
    module_name, _, name = model.partition(':')
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module of a user may raise any type
        raise FlagError(
            f'--model {model}: {module_name} cannot be imported from this folder or the installed packages '
            f'({_reason(error)})'
        ) from error
    found: Any = getattr(module, name, None)
    if not _is_module(found):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if _is_module(value)], 1, 0)
        hint = f'; did you mean {module_name}:{near[0]}?' if near else ''
        raise FlagError(f'--model {model}: {module_name} has no class {name} that is a flax.linen.Module{hint}')
    return found


def check_network(model: Classifier, image_shape: tuple[int, ...], dtype: Any, flag: str) -> None:
    """Traces a network of the user's in training and in evaluation, without computing anything.

    Raises:
        FlagError: if it raises an error, or if its features have another shape than `[B, feature_dim]`.
    """
    if isinstance(model.trunk, str):
        return
    images, labels = jax.ShapeDtypeStruct((2, *image_shape), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)
    key = jax.random.key(0)

    def train(images, labels):
        variables = initial_variables(model, key, images, labels)
        rest = [name for name in variables if name not in ('params', 'centers')]
        return model.apply(variables, images, labels, mutable=rest, rngs={'dropout': key})

    def evaluate(images, labels):
        variables = initial_variables(model, key, images, labels)
        return model.apply({name: value for name, value in variables.items() if name != 'centers'}, images)

    try:
        jax.eval_shape(train, images, labels)
        jax.eval_shape(evaluate, images, labels)
    except Exception as error:  # the code of a user may raise any type
        shape = ', '.join(map(str, images.shape))
        module = sys.modules[model.trunk.__module__]
        raise FlagError(
            f'--model {flag}: {model.trunk.__name__}(feature_dim={model.feature_dim}) fails on [{shape}]: '
            f'{_reason(error, module.__file__)}'
        ) from error


def _is_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _reason(error: BaseException, file: str | None = None) -> str:
    """Returns the type and the first line of an error, and the last line of `file` that led to it."""
    text = ' '.join(str(error).split('\n\n')[0].split())[:300]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f' ({file}, line {lines[-1]})' if lines else ''
    return f'{type(error).__name__}: {text}{place}'

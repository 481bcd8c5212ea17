"""The command line of a program: a frozen dataclass declares the flags, their defaults and their help.

A program imports JAX, datasets and plots in its functions, because they take seconds: --help and errors in flags do not
need them.
"""

import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from experiments.launch.errors import DataError, FlagError, RunError, Stopped
from experiments.launch.flags import DeviceFlags, flag


def main(
    config_class: type, experiment: Callable[[Any], None], prog: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the flags, runs the experiment and exits.

    The exit code is 2, with one line, for an error that the user can correct, and 1 for an error of the system. It is
    130 or 143, with a line that says how to continue, if SIGINT or SIGTERM stopped the run.
    """
    _prepare_streams()
    prog = f'python -m {prog}'
    code, message = 0, ''
    try:
        config, unknown = tyro.cli(
            config_class,
            prog=prog,
            description=sys.modules[config_class.__module__].__doc__,
            args=argv,
            return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if unknown:
            raise FlagError(_describe(unknown, config_class))
        if isinstance(config, DeviceFlags):
            config.initialize()
        experiment(config)
        _wait_for_others()
    except (DataError, FlagError, RunError, ValueError) as error:
        code, message = 2, str(error)
    except Stopped as stopped:
        code, message = stopped.exit_code, str(stopped)
        _wait_for_others()
    except OSError as error:
        what = error.filename or 'a file or the output'
        code, message = 1, f'{what} could not be read or written ({error.strerror or error})'
    except KeyboardInterrupt:
        code, message = 130, 'interrupted'
    if message:
        sys.stderr.write(f'{prog}: {message}\n')
    sys.exit(code)


def _describe(unknown: Sequence[str], config_class: type) -> str:
    """Returns a line about the first unknown argument, with the flag whose name, or the end of it, is nearest."""
    first = next((word for word in unknown if word.startswith('-')), unknown[0])
    given = first.partition('=')[0].lstrip('-').replace('_', '-')
    words = {field.name: field.name.split('_') for field in dataclasses.fields(config_class)}
    ends = [('-'.join(parts[start:]), name) for name, parts in words.items() for start in range(len(parts))]
    near = difflib.get_close_matches(given, [end for end, _ in ends], n=1)
    hint = ' or '.join(flag(name) for end, name in ends if end in near)
    return f'{first} is an unknown argument; ' + (f'did you mean {hint}?' if hint else '--help lists the flags')


def _prepare_streams() -> None:
    """Makes each standard stream take any text, and opens the closed ones, whose numbers files would take."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.dup(number)
    os.close(number)
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  # until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def _wait_for_others() -> None:
    """Waits for the other processes of the run, of which there are none if the program has not imported JAX."""
    if 'jax' in sys.modules:
        from experiments.launch import processes

        processes.barrier('exit')

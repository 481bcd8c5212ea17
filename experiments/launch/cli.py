"""The command line of a program: a frozen dataclass declares the flags, their defaults and their help."""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from experiments.data.tfds_cache import DataError
from experiments.launch import processes
from experiments.launch.errors import FlagError
from experiments.launch.flags import DeviceFlags
from experiments.launch.rendezvous import JoinError
from experiments.launch.run_folder import RunError
from experiments.launch.stopping import Stopped


def main(
    config_class: type, experiment: Callable[[Any], None], prog: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the flags, runs the experiment and exits.

    The exit code is 2, with one line, for an error that the user can correct. It is 130 or 143, with a line that says
    how to continue, if SIGINT or SIGTERM stopped the run.
    """
    prog = f'python -m {prog}'
    code, message = _outcome(config_class, experiment, prog, argv)
    if message:
        sys.stderr.write(f'{prog}: {message}\n')
    processes.fail(code, message)
    sys.exit(code)


def _outcome(
    config_class: type, experiment: Callable[[Any], None], prog: str, argv: Sequence[str] | None
) -> tuple[int, str]:
    try:
        config = tyro.cli(
            config_class,
            prog=prog,
            description=sys.modules[config_class.__module__].__doc__,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(config, DeviceFlags):
            config.join()
        experiment(config)
        processes.leave()
    except (DataError, FlagError, JoinError, RunError, ValueError) as error:
        return 2, str(error)
    except Stopped as stopped:
        processes.leave()  # all have stopped at the same step
        return stopped.exit_code, str(stopped)
    except KeyboardInterrupt:
        return 130, 'interrupted'
    except Exception:
        if not processes.several():
            raise
        processes.look_for_the_lost()
        return 1, traceback.format_exc()
    return 0, ''

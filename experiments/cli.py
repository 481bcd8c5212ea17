"""The command line of an experiment: a frozen dataclass is its flags, its defaults and its help."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import simple_parsing

from experiments.data import DataError
from experiments.runs import RunError
from experiments.stopping import Stopped


class _Parser(simple_parsing.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message}\n')


def main(
    config_class: type, experiment: Callable[[Any], None], prog: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the flags and runs the experiment. What a user can put right ends in a line and exit code 2.

    A run that was asked to stop ends in a line that says how to go on, and exit code 130 or 143.
    """
    parser = _Parser(
        prog=f'python -m {prog}',
        description=sys.modules[config_class.__module__].__doc__,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
    )
    parser.add_arguments(config_class, 'config')  # pyright: ignore[reportArgumentType, reportCallIssue]  # a dataclass
    try:
        experiment(parser.parse_args(argv).config)
    except (DataError, RunError, ValueError) as error:
        parser.error(str(error))
    except Stopped as stopped:
        parser.exit(stopped.exit_code, f'{parser.prog}: {stopped}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    sys.exit(0)

"""The command line of an experiment: a frozen dataclass is its flags, its defaults and its help."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import simple_parsing

from experiments.data.tfds_cache import DataError
from experiments.launch import processes
from experiments.launch.flags import DeviceFlags
from experiments.launch.rendezvous import JoinError
from experiments.launch.run_folder import RunError
from experiments.launch.stopping import Stopped


class _Parser(simple_parsing.ArgumentParser):
    def add_argument_group(self, title: str | None = None, description: str | None = None, *_, **__) -> Any:
        """The flags of the one dataclass. One that may be left out may not be given without a value."""
        group = super().add_argument_group('flags' if description else title, description)
        add = group.add_argument

        def add_strictly(*names: str, **options: Any) -> argparse.Action:
            if options.get('nargs') == '?':
                options |= {'nargs': None, 'metavar': options['metavar'].strip('[]')}
            if options.get('type') is Path:
                options |= {'type': folder, 'metavar': 'folder'}
            return add(*names, **options)

        group.add_argument = add_strictly
        return group

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message}\n')


def folder(text: str) -> Path:
    """An empty text, such as a shell variable that is not set, would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder; for the current directory give .")
    return Path(text)


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
    code, message = _outcome(parser, experiment, argv)
    if message:
        sys.stderr.write(f'{parser.prog}: {message}\n')
    processes.fail(code, message)
    sys.exit(code)


def _outcome(parser: _Parser, experiment: Callable[[Any], None], argv: Sequence[str] | None) -> tuple[int, str]:
    try:
        config = parser.parse_args(argv).config
        if isinstance(config, DeviceFlags):
            config.join()
        experiment(config)
        processes.leave()
    except (DataError, JoinError, RunError, ValueError) as error:
        return 2, str(error)
    except Stopped as stopped:
        processes.leave()  # all have stopped at the same step
        return stopped.exit_code, str(stopped)
    except OSError as error:
        what = error.filename or 'a file or the output'
        return 1, f'{what} could not be read or written ({error.strerror or error})'
    except KeyboardInterrupt:
        return 130, 'interrupted'
    except Exception:
        if not processes.several():
            raise
        processes.look_for_the_lost()
        return 1, traceback.format_exc()
    return 0, ''

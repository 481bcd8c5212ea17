"""A program runs and ends alike wherever its output goes."""

import dataclasses
import io
import subprocess
import sys

import pytest

from experiments.launch import cli, output
from experiments.launch.errors import FlagError


@dataclasses.dataclass(frozen=True)
class Config:
    """A program without flags."""


def prints(config: Config) -> None:
    output.console().print('猫 ñandú')
    raise FlagError('no 猫')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_text_that_the_terminal_lacks_is_printed_escaped(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    with pytest.raises(SystemExit) as end:
        cli.main(Config, prints, 'program', [])
    assert end.value.code == 2
    for stream, text in zip(streams, ('猫 ñandú\n', 'python -m program: no 猫\n'), strict=True):
        stream.flush()
        assert stream.buffer.getvalue() == text.encode(encoding, 'backslashreplace')  # pyright: ignore[reportAttributeAccessIssue]


CLOSED = """
import dataclasses
import os
import sys

from experiments.launch import cli
from experiments.launch.errors import FlagError


@dataclasses.dataclass(frozen=True)
class Config:
    pass

def writes(config):
    with open(sys.argv[1], 'w') as file:
        os.write(1, b'not in the file')
        os.write(2, b'not in the file')
        print('nor this')
        file.write('whole')
    raise FlagError('an error that nobody reads')


cli.main(Config, writes, 'program', [])
"""


def test_a_program_whose_streams_are_closed_writes_its_files_and_ends_with_its_code(tmp_path):
    path = tmp_path / 'file'
    shell = 'exec "$@" <&- >&- 2>&-'
    result = subprocess.run(['sh', '-c', shell, 'sh', sys.executable, '-c', CLOSED, str(path)], check=False)
    assert result.returncode == 2
    assert path.read_text() == 'whole'

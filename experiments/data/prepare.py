"""Prepares public datasets, once, so that every later run only reads them.

TFDS does it in a process of its own. It brings TensorFlow, which must not share a process with training, and
can be stopped when no network answers, for TFDS keeps trying for minutes.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tensorflow_datasets as tfds

from experiments.data.tfds_cache import DataError, find, lock_cache, unfinished

# How long the first answer to a download may take, in seconds: long enough for a slow proxy, and short enough for the
# error to be there within 20, of which TensorFlow's import takes up to 8. What has begun to arrive may take as long as
# it likes. So many connections that break at once, as without a name server, need no such wait.
FIRST_ANSWER_SECONDS = 6.0
BROKEN = 3


def public(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The copy of a public set in `data_dir`, prepared now if it is not there."""
    copy = find(name, data_dir)
    if copy is None and importlib.util.find_spec('tensorflow') is None:
        raise DataError(
            f'{name} is not in {data_dir} yet, and preparing it takes TensorFlow, once.\n'
            'Install it:  python -m pip install -e ".[prepare]"\n'
            'or pass the --data-dir of a copy prepared elsewhere as array_record, which is read without it.'
        )
    if copy is None:
        with lock_cache(data_dir):
            copy = find(name, data_dir) or _prepare(name, data_dir)
    return copy


def _prepare(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    print(f'Preparing {name} in {data_dir}, once; this may take minutes.', file=sys.stderr)
    before = _downloads(data_dir)
    command = [sys.executable, '-m', 'experiments.data.prepare', name, str(data_dir)]
    quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '-1'}
    with tempfile.TemporaryFile('w+') as output, tempfile.TemporaryFile('w+') as log:
        process = subprocess.Popen(
            command, stdout=output, stderr=log, env=os.environ | quiet, cwd=Path(__file__).parents[2]
        )
        try:
            answered = _wait(process, data_dir, before, log.fileno())
        finally:
            process.kill()
            process.wait()
            _sweep(name, data_dir)
        output.seek(0)
        log.seek(0)
        lines = output.read().splitlines()
        urls = [line for line in lines if line.startswith('http')]
        reason = lines[len(urls) :]
        tries = re.findall('connection broken by (.*): /', log.read())
    if not answered:
        reason = [
            'no answer; is there a network?',
            *(line.strip('\'"') for line in tries[-1:]),
        ]
    if reason or process.returncode:
        raise DataError(_failure(name, data_dir, urls, reason, process.returncode))
    copy = find(name, data_dir)
    if copy is None:
        raise DataError(f'{name} is incomplete in {data_dir}; remove its folder there, and run this again')
    return copy


def _wait(process: subprocess.Popen, data_dir: Path, before: set[Path], log: int) -> bool:
    """Waits for the end of the process: True; or, once its downloads had no answer for too long: False.

    TFDS makes a folder `*.tmp.*` when it asks for a file, and puts the file there when the answer begins.
    """
    asked = None
    while process.poll() is None:
        new = _downloads(data_dir) - before
        if any(path.is_file() for path in new):
            process.wait()
        elif any('.tmp.' in path.name for path in new):
            asked = asked or time.monotonic()
            broken = os.pread(log, 2**16, 0).count(b'connection broken by')  # the process's place in the log stays
            if broken >= BROKEN or time.monotonic() - asked > FIRST_ANSWER_SECONDS:
                return False
        time.sleep(0.1)
    return True


def _downloads(data_dir: Path) -> set[Path]:
    # Not rglob, which does not expect folders to vanish meanwhile.
    tree = os.walk(data_dir / 'downloads')
    return {Path(parent, name) for parent, folders, files in tree for name in (*folders, *files)}


def _sweep(name: str, data_dir: Path) -> None:
    """Removes what an interrupted preparation left; none is in use, for only the lock's holder prepares."""
    folder = data_dir / re.split('[/:]', name)[0]
    for left in [*unfinished(folder), *unfinished(data_dir / 'downloads')]:
        shutil.rmtree(left, ignore_errors=True)


def _failure(name: str, data_dir: Path, urls: list[str], reason: list[str], code: int) -> str:
    # Where a download went is of no use when it has been swept away.
    reason = [re.sub(', downloaded to [^,]*', '', line)[:300] for line in reason if line.strip()][:4] or [
        f'its process ended with code {code}'
    ]
    more = f' and {len(urls) - 1} more' if len(urls) > 1 else ''
    return '\n'.join(
        [
            f'{name} could not be prepared in {data_dir}:',
            *(f'  {line}' for line in reason),
            *([f'It is fetched from {urls[0]}{more}.'] if urls else []),
            'Run it where that works, or pass the --data-dir of a copy prepared there as array_record.',
        ]
    )


def main(name: str, data_dir: str) -> None:
    """What the other process does. Its output: the URLs, then the reason of a failure, if any."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            print(*sorted(builder.url_infos or {}), sep='\n', file=sys.__stdout__, flush=True)
            builder.download_and_prepare(
                file_format='array_record',
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except Exception as error:  # whatever the code of one of hundreds of sets may raise
            print(f'{type(error).__name__}: {error}', file=sys.__stdout__, flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])

"""Prepares public datasets, once, so that every later run only reads them.

TFDS prepares them in a process of its own, since TensorFlow must not share a process with training. That process first
asks for one file, because TFDS retries for minutes if there is no network.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import requests
import tensorflow_datasets as tfds

from experiments.data.tfds_cache import find, lock_cache, unfinished
from experiments.launch.errors import DataError

# The time within which a server must begin to answer. A download may take any time.
FIRST_ANSWER_SECONDS = 20


def public(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the copy of a public dataset in `data_dir`, and prepares it first if it is not there."""
    copy = find(name, data_dir)
    if copy is None and importlib.util.find_spec('tensorflow') is None:
        raise DataError(
            f'{name} is not in {data_dir} yet; preparing it takes TensorFlow, once.\n'
            'Install it:  python -m pip install -e ".[prepare]"\n'
            'or pass the --data-dir of a copy prepared elsewhere as array_record, which is read without it.'
        )
    if copy is None:
        with lock_cache(data_dir):
            copy = find(name, data_dir) or _prepare(name, data_dir)
    return copy


def _prepare(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    print(f'Preparing {name} in {data_dir}, once; this may take minutes.', file=sys.stderr)
    command = [sys.executable, '-m', 'experiments.data.prepare', name, str(data_dir), str(FIRST_ANSWER_SECONDS)]
    quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '-1'}
    try:
        # The process ends when its standard input closes, and so with this one.
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            process.wait()
    finally:
        _remove_unfinished(name, data_dir)
    copy = None if process.returncode else find(name, data_dir)
    if copy is not None:
        return copy
    url, _, reason = output.partition('\n')
    if process.returncode == -signal.SIGALRM:
        reason = f'no answer within {FIRST_ANSWER_SECONDS} seconds; is there a network?'
    raise DataError(
        f'{name} could not be prepared in {data_dir}: {" ".join(reason.split()) or "its process ended early"} '
        f'(downloaded from {url or "an unknown address"}). Prepare it where the download works, or pass the --data-dir '
        'of a copy that was prepared elsewhere as array_record'
    )


def _remove_unfinished(name: str, data_dir: Path) -> None:
    """Removes the folders of an interrupted preparation; none is in use, since only the lock's holder prepares."""
    folder = data_dir / re.split('[/:]', name)[0]
    for path in [*unfinished(folder), *unfinished(data_dir / 'downloads')]:
        shutil.rmtree(path, ignore_errors=True)


def main(name: str, data_dir: str, first_answer_seconds: str) -> None:
    """Prepares a dataset in this process. Prints the address of a file and then, if it fails, the reason."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    signal.alarm(int(first_answer_seconds))  # ends the process; no timeout of requests bounds the lookup of a name
    with contextlib.redirect_stdout(sys.stderr):
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            _check_network(builder)
            signal.alarm(0)
            builder.download_and_prepare(
                file_format='array_record',
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except Exception as error:  # the code of hundreds of datasets may raise any type
            # The folder of a download is removed, so that its name is of no use.
            reason = re.sub(', downloaded to [^,]*', '', f'{type(error).__name__}: {error}')
            print(reason[:300], file=sys.__stdout__)
            sys.exit(1)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _check_network(builder: tfds.core.DatasetBuilder) -> None:
    """Raises ConnectionError if no server answers a request for a file of the dataset."""
    url = next((url for url in sorted(builder.url_infos or {}) if url.startswith('http')), '')
    print(url, file=sys.__stdout__, flush=True)
    if url:
        try:
            requests.get(url, stream=True).close()
        except requests.RequestException as error:
            raise ConnectionError(f'no answer; is there a network? ({type(error).__name__})') from error


if __name__ == '__main__':
    main(*sys.argv[1:])

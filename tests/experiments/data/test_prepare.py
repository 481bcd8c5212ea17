"""Against real sockets: TFDS is sent to a local proxy, which answers as a network does or does not.

It asks for `fashion_mnist`, whose files are behind plain http; TensorFlow is needed after the download only.
"""

import http.server
import subprocess
import sys
import threading
import time

import pytest

from experiments.data import prepare, tfds_cache


@pytest.fixture
def proxy(monkeypatch):
    """Starts a proxy that answers each request by this function."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, format, *args):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{server.server_port}')
        monkeypatch.delenv('no_proxy', raising=False)
        monkeypatch.delenv('NO_PROXY', raising=False)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def error_of_preparing(data_dir) -> str:
    with pytest.raises(tfds_cache.DataError, match='fashion_mnist could not be prepared') as error:
        prepare._prepare('fashion_mnist', data_dir)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert 'fashion-mnist.s3-website' in message
    assert '--data-dir' in message
    assert tfds_cache.find('fashion_mnist', data_dir) is None
    assert not [path for path in data_dir.rglob('*') if 'incomplete' in path.name or '.tmp.' in path.name]
    assert 'tensorflow' not in sys.modules
    return message


def test_what_others_put_beside_a_preparation_stays(tmp_path):
    left = [
        tmp_path / 'fashion_mnist' / 'incomplete.4XT2QG_3.0.1',
        tmp_path / 'fashion_mnist' / 'config' / 'incomplete.0A1B2C_1.0.0',
        tmp_path / 'downloads' / 'fashion_mnist' / f'train.gz.tmp.{32 * "a"}',
    ]
    kept = [
        tmp_path / 'fashion_mnist' / 'incomplete.notes',
        tmp_path / 'fashion_mnist' / 'incomplete.4XT2QG_3.0.1.bak',
        tmp_path / 'downloads' / 'my.tmp.files',
        tmp_path / 'mnist' / 'incomplete.4XT2QG_3.0.1',
    ]
    for path in (*left, *kept):
        path.mkdir(parents=True)
        (path / 'file').touch()
    (tmp_path / 'fashion_mnist' / 'incomplete.4XT2QG_3.0.2').symlink_to(kept[0])
    prepare._remove_unfinished('fashion_mnist', tmp_path)
    assert not any(path.exists() for path in left)
    assert all((path / 'file').exists() for path in kept)


@pytest.mark.slow
def test_no_answer_is_the_same_line_each_time(tmp_path, proxy, monkeypatch):
    monkeypatch.setattr(prepare, 'FIRST_ANSWER_SECONDS', 5)
    over = threading.Event()
    proxy(lambda request: over.wait(100))
    first, second = error_of_preparing(tmp_path), error_of_preparing(tmp_path)
    over.set()
    assert 'no answer within 5 seconds; is there a network?' in first
    assert first == second


def test_a_connection_that_is_refused_ends_preparation_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'FIRST_ANSWER_SECONDS', 600)
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # no server listens there
    begun = time.monotonic()
    assert 'no answer; is there a network?' in error_of_preparing(tmp_path)
    assert time.monotonic() - begun < 300


PREPARED = """
import sys
from pathlib import Path
from experiments.data import prepare

prepare.FIRST_ANSWER_SECONDS = 600
prepare._prepare('fashion_mnist', Path(sys.argv[1]))
"""


def test_a_preparation_ends_with_the_run_that_is_killed(tmp_path, proxy):
    asked, over = threading.Event(), threading.Event()

    def answer(request):
        asked.set()
        if request.connection.recv(1) == b'':  # the other end is closed
            over.set()

    proxy(answer)
    with subprocess.Popen([sys.executable, '-c', PREPARED, str(tmp_path)]) as run:
        assert asked.wait(300)
        run.kill()
    assert over.wait(60)


@pytest.mark.slow
def test_a_slow_download_that_lives_is_waited_for(tmp_path, proxy, monkeypatch):
    monkeypatch.setattr(prepare, 'FIRST_ANSWER_SECONDS', 10)

    def answer(request):
        request.send_response(200)
        request.send_header('Content-Length', '3')
        request.end_headers()
        for _ in range(3):
            request.wfile.write(b'x')
            time.sleep(8)

    proxy(answer)
    assert 'wrong checksum' in error_of_preparing(tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path, proxy):
    proxy(lambda request: request.send_error(404))
    message = error_of_preparing(tmp_path)
    assert 'HTTP code: 404' in message
    assert 'ubyte.gz' in message

"""Two processes on the loopback, with a table that lies over both, are one with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import one_of_two


def test_two_processes_have_the_centers_params_and_loss_of_one(tmp_path):
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, '-W', 'error', str(Path(one_of_two.__file__))]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    both = [
        subprocess.Popen(
            [*command, str(port), str(index), str(tmp_path / 'out.npz')],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for *_, code in ends] == [0, 0], ends
    # Processes that have drifted apart are found by both.
    assert all("['drifted'] is not the same on all devices: replicas 2, 3 differ from" in said for said, *_ in ends)

    model, losses = one_of_two.train(*one_of_two.arrays())
    with np.load(tmp_path / 'out.npz') as got:
        expected = {'centers': model['centers'], 'features': model['params']['features'], 'losses': losses}
        for name, want in expected.items():
            np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=name)

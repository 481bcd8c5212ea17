"""The devices of a run compile one program for its step."""

import numpy as np
import pytest

from experiments.data.splits import Split
from experiments.launch.mesh import choose
from experiments.train.loop import compile_ahead
from experiments.train.model import Classifier
from experiments.train.step import create_state, train_step
from tests.support.programs import compilations

SPLIT = Split(np.zeros((16, 8, 8, 1), np.uint8), np.arange(16, dtype=np.int32) % 3)


@pytest.mark.parametrize('parallel', ['auto', pytest.param('pmap', marks=pytest.mark.slow)])
def test_steps_run_the_program_that_was_compiled_ahead(parallel):
    devices = choose(parallel)
    state = create_state(Classifier('small', 2, 3), (8, 8, 1), 0, 1e-3, 0.5, devices)
    state, weight = devices.place_state(devices.fetch(state)), devices.place_state(np.float32(0.1))
    step = devices.compile(train_step)
    with compilations() as compiled:
        compile_ahead(step, state, SPLIT, 16, weight, devices)
        for _ in range(3):
            state, _ = step(state, *devices.place_batch(*SPLIT.take(range(16))), weight)
    assert len(compiled) == 1

"""Times the whole training step of the toy, with network and optimizers, here and in PyTorch."""

from typing import Any

import numpy as np

from experiments.bench import pytorch
from experiments.bench.problem import ALPHA, Implementation, Problem
from experiments.bench.timing import Timing, measure
from experiments.data.batches import steps_of, train_batches
from experiments.data.load import load
from experiments.launch.mesh import choose
from experiments.train.loop import train_epoch
from experiments.train.model import Classifier
from experiments.train.step import create_state, train_step

TOY_BATCH_SIZE, FEATURE_DIM, LEARNING_RATE = 32, 2, 3e-3


def measure_toy(rounds: int, torch: Any | None) -> list[dict[str, Any]]:
    """Measures the step in both libraries, and an epoch of the loop around ours.

    The loop reads batches and keeps metrics, as `experiments.toy2d` does between two evaluations.

    Args:
        rounds: Blocks of steps, and epochs of the loop.
        torch: The torch module, or None.

    Returns:
        A row for each arm.
    """
    data, devices = load('digits'), choose('none')
    batches = train_batches(data.train, TOY_BATCH_SIZE, seed=0)
    images, labels = next(batches)
    model = Classifier('small', FEATURE_DIM, data.num_classes)
    state = create_state(model, data.image_shape, 0, LEARNING_RATE, ALPHA, devices)
    step, weight = devices.compile(train_step), devices.place_state(np.float32(0.1))
    batch = devices.place_batch(images, labels)

    def steps():
        nonlocal state
        while True:
            state, metrics = step(state, *batch, weight)
            yield state, metrics

    arms = {'centerloss_jax': Implementation(steps())}
    if torch:
        arms['torch'] = pytorch.toy_step(torch, images, labels, data.num_classes, LEARNING_RATE)
    timings = {name: Timing.of(measure(arm.steps, rounds, arm.wait)) for name, arm in arms.items()}
    seconds, epoch_steps = [], steps_of(data.train, TOY_BATCH_SIZE)
    for _ in range(rounds):
        state, metrics = train_epoch(state, step, batches, epoch_steps, weight, devices, lambda *_: None)
        seconds.append(1 / metrics['steps_per_second'])
    timings['training loop'] = Timing.of(seconds)
    problem = Problem(TOY_BATCH_SIZE, data.num_classes, FEATURE_DIM)
    return [{'arm': name, **problem._asdict(), **timing.row()} for name, timing in timings.items()]

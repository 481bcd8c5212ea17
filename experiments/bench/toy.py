"""Times the whole training step of the toy, with network and optimizers, here and in PyTorch.

Images have the size of the digits, 8 x 8, or of MNIST, 28 x 28.
"""

from typing import Any

import numpy as np

from experiments.bench import pytorch
from experiments.bench.problem import ALPHA, Implementation, Problem
from experiments.bench.timing import Timing, measure
from experiments.data.batches import steps_of, train_batches
from experiments.data.load import Dataset, load
from experiments.launch.mesh import Devices, choose
from experiments.train.loop import compile_ahead, train_epoch
from experiments.train.model import Classifier
from experiments.train.step import create_state, train_step

TOY_BATCH_SIZE, FEATURE_DIM, LEARNING_RATE = 32, 2, 3e-3
MNIST_SHAPE = (28, 28, 1)


def measure_toy(rounds: int, torch: Any | None) -> dict[str, list[dict[str, Any]]]:
    """Measures the step in both libraries, and an epoch of the loop around ours on the digits.

    The loop reads batches and keeps metrics, as `experiments.toy2d` does between two evaluations.

    Args:
        rounds: Blocks of steps, and epochs of the loop.
        torch: The torch module, or None.

    Returns:
        A row for each arm, by the size of the images.
    """
    data, devices = load('digits'), choose('none')
    images, labels = data.train.take(range(TOY_BATCH_SIZE))
    pixels = np.random.default_rng(0).integers(0, 256, (TOY_BATCH_SIZE, *MNIST_SHAPE), np.uint8)
    digits = _time_steps(images, labels, data.num_classes, rounds, torch, devices)
    digits['training loop'] = _time_loop(data, rounds, devices)
    mnist = _time_steps(pixels, labels, data.num_classes, rounds, torch, devices)
    problem = Problem(TOY_BATCH_SIZE, data.num_classes, FEATURE_DIM)._asdict()
    return {
        name: [{'arm': arm, **problem, **timing.row()} for arm, timing in timings.items()]
        for name, timings in (('toy', digits), ('toy, 28 x 28', mnist))
    }


def _start(image_shape: tuple[int, ...], num_classes: int, devices: Devices) -> tuple[Any, Any, Any]:
    """Returns the first state, the compiled step, and the weight of the center loss on its device."""
    model = Classifier('small', FEATURE_DIM, num_classes)
    state = create_state(model, image_shape, 0, LEARNING_RATE, ALPHA, devices)
    return state, devices.compile(train_step), devices.place_state(np.float32(0.1))


def _time_steps(
    images: np.ndarray, labels: np.ndarray, num_classes: int, rounds: int, torch: Any | None, devices: Devices
) -> dict[str, Timing]:
    """Times steps on one batch, by arm."""
    state, step, weight = _start(images.shape[1:], num_classes, devices)
    batch = devices.place_batch(images, labels)

    def steps():
        nonlocal state
        while True:
            state, metrics = step(state, *batch, weight)
            yield state, metrics

    arms = {'centerloss_jax': Implementation(steps())}
    if torch:
        arms['torch'] = pytorch.toy_step(torch, images, labels, num_classes, LEARNING_RATE)
    return {name: Timing.of(measure(arm.steps, rounds, arm.wait)) for name, arm in arms.items()}


def _time_loop(data: Dataset, rounds: int, devices: Devices) -> Timing:
    """Times a step of the loop of `experiments.toy2d`, as the mean of an epoch."""
    state, step, weight = _start(data.image_shape, data.num_classes, devices)
    batches, steps = train_batches(data.train, TOY_BATCH_SIZE, seed=0), steps_of(data.train, TOY_BATCH_SIZE)
    compile_ahead(step, state, data.train, TOY_BATCH_SIZE, weight, devices)
    seconds = []
    for _ in range(rounds):
        state, metrics = train_epoch(state, step, batches, steps, weight, devices, lambda *_: None)
        seconds.append(1 / metrics['steps_per_second'])
    return Timing.of(seconds)

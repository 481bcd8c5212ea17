"""The step of this library on a classifier: a softmax over all classes or a sample, and SGD with momentum by rows.

A step computes the loss and its gradient for the features, and moves the table. Table and momentum are donated.
"""

import math
from functools import partial
from typing import Any

import jax
import optax

import centerloss_jax as clj
from experiments.bench.problem import MOMENTUM, RATE, Implementation, Problem


def full_softmax(problem: Problem) -> Implementation:
    """Runs the step over all classes."""
    return _compile_classifier(problem, None)


def sampled_softmax(problem: Problem, share: float) -> Implementation:
    """Runs the step over a share of the classes, drawn at each step; every class of the batch is among them."""
    return _compile_classifier(problem, num_sampled(problem, share))


def num_sampled(problem: Problem, share: float) -> int:
    """Returns the number of classes in a sample: at least those of the batch fit."""
    return max(math.ceil(share * problem.num_classes), min(problem.batch_size, problem.num_classes))


def first_table(problem: Problem) -> jax.Array:
    """Returns the table `[C, D]` before the first step."""
    return 0.01 * jax.random.normal(jax.random.key(0), (problem.num_classes, problem.feature_dim))


def classifier_step(size: int | None, table, state, key, x, labels):
    """Returns (table, state, key, loss, gradient for x) after one step over `size` classes, or all."""
    key, subkey = jax.random.split(key)
    classes = None if size is None else clj.sample_classes(subkey, labels, len(table), size)
    loss_fn = partial(clj.class_softmax_and_rows, table=table, labels=labels, classes=classes)
    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    updates, state = _transform().update(rows, state, table)
    return optax.apply_updates(table, updates), state, key, loss, gradient


def _transform() -> Any:
    return clj.by_rows(optax.sgd(RATE, momentum=MOMENTUM))


def _compile_classifier(problem: Problem, size: int | None) -> Implementation:
    x, labels = jax.device_put(problem.batch())
    table = jax.jit(first_table, static_argnums=0)(problem)
    carry = table, jax.jit(_transform().init)(table), jax.random.key(1)
    del table
    compiled = jax.jit(partial(classifier_step, size), donate_argnums=(0, 1)).lower(*carry, x, labels).compile()

    def steps():
        nonlocal carry
        while True:
            *carry, loss, gradient = compiled(*carry, x, labels)
            yield carry[0], loss, gradient
            del loss, gradient  # so that the next step can reuse their memory

    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    return Implementation(steps(), temporary_bytes=memory.temp_size_in_bytes, accessed_bytes=cost.get('bytes accessed'))

"""Sorts and scatters of the compiled training step, read from the program."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import centerloss_jax as clj
from tests.support.programs import operations, shapes
from tests.support.steps import update

N, D = 64, 6
# As many classes as rows are counted in arrays [C]; more are sorted.
CLASSES = {'C <= N': N, 'C > N': N + 1, 'C much larger': 1_000_000}


def step(table, state, x, labels):
    def loss_fn(x):
        return clj.center_loss_and_rows(x, table, labels)

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    return *update(clj.center_update(0.5), rows, state, table), loss, gradient


def compiled_step(num_classes: int) -> Counter[str]:
    table, x, labels = shapes(((num_classes, D), jnp.float32), ((N, D), jnp.float32), ((N,), jnp.int32))
    arguments = table, jax.eval_shape(clj.center_update().init, table), x, labels
    return operations(jax.jit(step, donate_argnums=0).lower(*arguments).compile())


def test_operations_counts_what_a_program_does():
    def two_sorts(a):
        return jnp.sort(a), jnp.sort(-a), jnp.zeros((1000, 3)).at[a].add(1.0)

    count = operations(jax.jit(two_sorts).lower(jax.ShapeDtypeStruct((100,), jnp.int32)).compile())
    assert count['sort'] == 2
    assert count['scatter'] == 1


@pytest.mark.parametrize('num_classes', CLASSES.values(), ids=CLASSES.keys())
def test_a_step_sorts_once_at_most_and_only_where_classes_outnumber_rows(num_classes):
    count = compiled_step(num_classes)
    assert count['sort'] == (num_classes > N), count
    # Up to C classes it counts rows and adds their sums; beyond, the sorted rows of a class are numbered and packed.
    assert count['scatter'] <= (4 if num_classes > N else 2), count
    assert count['while'] == 1, count  # one pass over the rows serves the table and step_norm

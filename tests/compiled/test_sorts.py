"""Sorts and scatters of the compiled training step, read from the program."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import centerloss_jax as clj
from tests.support.cases import some_by_default
from tests.support.programs import AS_USERS, operations, shapes
from tests.support.steps import update

N = 64
# A CPU counts up to 8 N classes in arrays [C]. For more, and for wide rows of more classes than rows, it sorts.
NARROW = {'C <= N': N, 'C > N': N + 1, 'C <= 8 N': 8 * N, 'C > 8 N': 8 * N + 1, 'C much larger': 1_000_000}


def step(table, state, x, labels):
    def loss_fn(x):
        return clj.center_loss_and_rows(x, table, labels)

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    return *update(clj.center_update(0.5), rows, state, table), loss, gradient


def compiled_step(num_classes: int, num_features: int) -> Counter[str]:
    table, x, labels = shapes(
        ((num_classes, num_features), jnp.float32), ((N, num_features), jnp.float32), ((N,), jnp.int32)
    )
    arguments = table, jax.eval_shape(clj.center_update().init, table), x, labels
    return operations(jax.jit(step, donate_argnums=0).lower(*arguments).compile(AS_USERS))


def test_operations_counts_what_a_program_does():
    def two_sorts(a):
        return jnp.sort(a), jnp.sort(-a), jnp.zeros((1000, 3)).at[a].add(1.0)

    count = operations(jax.jit(two_sorts).lower(jax.ShapeDtypeStruct((100,), jnp.int32)).compile(AS_USERS))
    assert count['sort'] == 2
    assert count['scatter'] == 1


@pytest.mark.parametrize('num_classes', some_by_default(NARROW, 'C <= N', 'C > 8 N'))
def test_a_step_of_few_features_sorts_once_and_only_for_many_classes(num_classes):
    count = compiled_step(num_classes, 6)
    assert count['sort'] == (num_classes > 8 * N), count
    # It counts rows, finds the first of each class where C > N, and adds the sums; the sorted rows of a class are
    # numbered and their counts are put back.
    assert count['scatter'] <= (2 if num_classes <= N else 3 if num_classes <= 8 * N else 5), count
    assert count['while'] == 1, count  # one pass over the rows serves the table and step_norm


@pytest.mark.parametrize('num_classes', [N + 1, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_step_of_many_features_sorts_once_where_classes_outnumber_rows(num_classes):
    count = compiled_step(num_classes, 200)
    assert count['sort'] == 1, count
    assert count['while'] == 3, count  # single rows, repeated rows, and repeated rows again for step_norm

"""center_update takes rows and nothing else: arithmetic for gradients never moves another class's center."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support.steps import move

TABLE = jnp.asarray(np.random.default_rng(0).normal(1, 2, (17, 3)), jnp.float32)


def make_rows(*indices, seed=1):
    values = np.random.default_rng(seed).normal(size=(len(indices), 3))
    return clj.RowUpdates(jnp.array(indices, jnp.int32), jnp.asarray(values, jnp.float32))


def update(rows, jit=False):
    return (jax.jit(move) if jit else move)(TABLE, rows)


# What users do to a whole tree of gradients, where it leaves integers integers. 7 + 7 is 14, 3 + 4 is 7 and
# 3 * 3 is 9: rows that the table has and that neither pass touched.
INTEGER_ARITHMETIC = {
    'added': jnp.add,
    'subtracted': jnp.subtract,
    'added to itself': lambda a, b: a + a,
    'added up over three passes': lambda a, b: a + b + a,
    'times an integer': lambda a, b: 2 * a,
    'negated': lambda a, b: -a,
    'zeroed': lambda a, b: jnp.zeros_like(a),
    'clipped to integers': lambda a, b: jnp.clip(a, -1, 1),
    'clipped to larger integers': lambda a, b: jnp.clip(a, -5, 5),
    'signs': lambda a, b: jnp.sign(a),
    'squared': lambda a, b: a * a,
    'multiplied': jnp.multiply,
}

FLOAT_ARITHMETIC = {
    'averaged': lambda a, b: (a + b) / 2,
    'scaled by a number': lambda a, b: 0.1 * a,
    'scaled by an array': lambda a, b: jnp.float32(1) * a,
    'clipped': lambda a, b: jnp.clip(a, -1.0, 1.0),
    'cast': lambda a, b: a.astype(jnp.bfloat16),
}


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('arithmetic', INTEGER_ARITHMETIC.values(), ids=INTEGER_ARITHMETIC.keys())
def test_rows_that_are_no_longer_rows_are_dropped_and_counted(arithmetic, jit):
    rows = jax.tree.map(lambda p, q: arithmetic(jnp.asarray(p), jnp.asarray(q)), make_rows(7, 3, 1), make_rows(7, 4, 2))
    moved, state = update(rows, jit)
    np.testing.assert_array_equal(moved, TABLE)
    assert state.left_out == 3


@pytest.mark.parametrize('bound', [10, 10**4, 10**7, 5 * 10**8])
def test_rows_of_a_large_table_that_were_clipped_are_dropped_and_counted(bound):
    # No table at hand: whether such rows are within it does not save anybody.
    rows = clj.RowUpdates(jnp.array([2**31 - 3, 7]), jnp.ones((2, 3)))
    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -bound, bound), rows)
    transform: Any = clj.center_update(0.5)
    updates, state = transform.update(clipped, transform.init(None))
    np.testing.assert_array_equal(updates.values, np.zeros((2, 3)))
    assert state.left_out == 2


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('arithmetic', FLOAT_ARITHMETIC.values(), ids=FLOAT_ARITHMETIC.keys())
def test_rows_that_were_scaled_are_refused(arithmetic, jit):
    rows = jax.tree.map(lambda p, q: arithmetic(jnp.asarray(p), jnp.asarray(q)), make_rows(7, 3), make_rows(7, 4))
    with pytest.raises(TypeError, match=r'RowUpdates.*with_centers'):
        update(rows, jit)


@pytest.mark.parametrize('num_devices', [2, 3, 8])
def test_rows_summed_over_devices_are_dropped_and_counted(per_device, num_devices):
    # Over two devices label 3 becomes row 6.
    x = np.ones((num_devices, 2, 3), np.float32)
    labels = np.tile(np.array([3, 1], np.int32), (num_devices, 1))
    transform = clj.center_update(0.5)

    def step(batch, table):
        rows = jax.lax.psum(clj.center_rows(batch[0], table, batch[1]), 'batch')
        updates, state = transform.update(rows, transform.init(table), table)
        return optax.apply_updates(table, updates), state

    tables, state = per_device(step, (x, labels), TABLE)
    for device in range(num_devices):
        np.testing.assert_array_equal(tables[device], TABLE)
    np.testing.assert_array_equal(state.left_out, [2] * num_devices)


@pytest.mark.parametrize('reduce', [jax.lax.psum, jax.lax.pmean], ids=['psum', 'pmean'])
def test_rows_reduced_with_the_gradients_never_reach_another_class_through_the_gather(per_device, reduce):
    transform = clj.center_update(0.5, axis_name='batch')

    def step(batch, table):
        rows = reduce(clj.center_rows(batch[0], table, batch[1]), 'batch')
        updates, state = transform.update(rows, transform.init(table), table)
        return optax.apply_updates(table, updates), state

    batch = np.ones((2, 2, 3), np.float32), np.full((2, 2), 3, np.int32)
    if reduce is jax.lax.pmean:
        with pytest.raises(TypeError, match=r'RowUpdates.*pmean'):
            per_device(step, batch, TABLE)
    else:
        tables, state = per_device(step, batch, TABLE)
        np.testing.assert_array_equal(tables[0], TABLE)
        np.testing.assert_array_equal(state.left_out, [4, 4])


NOT_ROWS = {
    'a dense gradient': TABLE,
    'a NumPy gradient': np.asarray(TABLE),
    'a tree with a dense gradient': {'center': {'centers': TABLE}},
    'rows beside a dense gradient': {'a': make_rows(1), 'b': TABLE},
    'a pair of indices and values': (make_rows(1).indices, make_rows(1).values),
    'a number': 0.0,
    'None': None,
    'nothing in a tree': {'center': {}},
}


@pytest.mark.parametrize('updates', NOT_ROWS.values(), ids=NOT_ROWS.keys())
@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_anything_but_rows_is_an_error_that_says_what_to_pass(updates, jit):
    with pytest.raises(TypeError, match=r'RowUpdates.*center_loss_and_rows'):
        update(updates, jit)


def test_the_error_names_what_it_got():
    with pytest.raises(TypeError, match=r'17, ?3'):
        update(TABLE)


@pytest.mark.parametrize(
    ('indices', 'values'),
    [
        pytest.param(jnp.arange(2), jnp.ones((2, 5)), id='of another width'),
        pytest.param(jnp.arange(2), jnp.ones((2, 1)), id='that would broadcast'),
        pytest.param(jnp.arange(2), jnp.ones((3, 3)), id='of another number'),
        pytest.param(jnp.arange(2)[:, None], jnp.ones((2, 3)), id='with a column of indices'),
        pytest.param(jnp.arange(2), jnp.ones(3), id='as a vector'),
    ],
)
def test_rows_that_do_not_fit_the_table_are_an_error(indices, values):
    with pytest.raises(ValueError, match=r'[Rr]ow'):
        update(clj.RowUpdates(indices, values))

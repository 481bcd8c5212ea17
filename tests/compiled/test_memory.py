"""Memory of compiled programs: temporaries that do not grow with the table, and a table updated in place.

Programs are compiled from shapes alone, and nothing is allocated or run. The compiler reports the same numbers every
time, whatever else the machine does.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import centerloss_jax as clj
from centerloss_jax import _tables
from tests.support.cases import some_by_default
from tests.support.programs import MB, memory, shapes
from tests.support.steps import linen_state, linen_step, nnx_pair, nnx_step, update

BIG = {'num_classes': 1_000_000, 'num_features': 64}
TABLE_BYTES = 1_000_000 * 64 * 4


def batch(size=256, *leading):
    return shapes(((*leading, size, 6), jnp.float32), ((*leading, size), jnp.int32))


def linen_program(batch_norm, **jit_options):
    state = jax.eval_shape(partial(linen_state, batch_norm=batch_norm, **BIG))
    return memory(jax.jit(linen_step, **jit_options), state, *batch())


def nnx_program(graph, batch_norm, **jit_options):
    model, optimizer = nnx.eval_shape(partial(nnx_pair, graph=graph, batch_norm=batch_norm, **BIG))
    step = nnx.jit(partial(nnx_step, graph=graph), graph=graph, **jit_options)
    return memory(step, model, optimizer, *batch())


PROGRAMS = {
    'linen': (partial(linen_program, False), {'donate_argnums': 0}),
    'linen, BatchNorm': (partial(linen_program, True), {'donate_argnums': 0}),
    'nnx, BatchNorm': (partial(nnx_program, True, True), {'donate_argnames': ('model', 'optimizer')}),
    'nnx tree mode, BatchNorm': (
        partial(nnx_program, False, True),
        {'donate_argnames': ('model', 'optimizer')},
    ),
}


@pytest.mark.parametrize(('program', 'donation'), some_by_default(PROGRAMS, 'linen'))
def test_a_train_step_updates_a_million_classes_in_place(program, donation):
    analysis = program(**donation)
    assert analysis.temp_size_in_bytes < 8 * MB
    assert analysis.alias_size_in_bytes >= TABLE_BYTES


@pytest.mark.slow
def test_a_state_that_is_not_donated_is_copied():
    # A user who forgets to donate sees this, and so would the test above.
    assert linen_program(batch_norm=False).alias_size_in_bytes < MB


@pytest.mark.slow
def test_eight_steps_inside_a_scan_stay_in_place():
    state = jax.eval_shape(partial(linen_state, **BIG))

    def epoch(state, images, labels):
        return jax.lax.scan(lambda state, batch: linen_step(state, *batch), state, (images, labels))

    analysis = memory(jax.jit(epoch, donate_argnums=0), state, *batch(256, 8))
    assert analysis.temp_size_in_bytes < 8 * MB
    assert analysis.alias_size_in_bytes >= TABLE_BYTES


@pytest.mark.slow
def test_a_replicated_state_is_updated_in_place_by_pmap():
    state = jax.eval_shape(partial(linen_state, axis_name='batch', **BIG))
    replicated = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype), state)
    step = jax.pmap(partial(linen_step, axis_name='batch'), axis_name='batch', donate_argnums=0)
    analysis = memory(step, replicated, *batch(256, 8))
    assert analysis.temp_size_in_bytes < 8 * MB
    assert analysis.alias_size_in_bytes >= TABLE_BYTES


def one_lookup(x, table, labels):
    return clj.center_loss_and_rows(x, table, labels)


def two_lookups(x, table, labels):
    return clj.center_loss(x, table, labels), clj.center_rows(x, table, labels)


def table_step(loss_and_rows, table, state, x, labels):
    (loss, rows), gradient = jax.value_and_grad(loss_and_rows, has_aux=True)(x, table, labels)
    updates, state = clj.center_update(0.5).update(rows, state, table)
    return optax.apply_updates(table, updates), state, loss, gradient


def table_program(loss_and_rows, num_classes, dtype=jnp.float32, size=256):
    arrays = shapes(((num_classes, 512), dtype), ((size, 512), dtype), ((size,), jnp.int32))
    state = jax.eval_shape(clj.center_update().init, arrays[0])
    return memory(jax.jit(partial(table_step, loss_and_rows), donate_argnums=0), arrays[0], state, *arrays[1:])


@pytest.mark.parametrize('loss_and_rows', [one_lookup, pytest.param(two_lookups, marks=pytest.mark.slow)])
def test_temporaries_do_not_depend_on_the_number_of_classes(loss_and_rows):
    few, most = (table_program(loss_and_rows, c) for c in (1_000, 1_000_000))
    assert few.temp_size_in_bytes == most.temp_size_in_bytes < 8 * MB
    assert most.alias_size_in_bytes >= 1_000_000 * 512 * 4


@pytest.mark.parametrize('num_classes', [1_000_000, pytest.param(1_000, marks=pytest.mark.slow)])
def test_gradient_rows_and_move_share_one_array(num_classes):
    assert table_program(one_lookup, num_classes, size=4096).temp_size_in_bytes < 0.6 * 4096 * 512 * 4


def embedding_step(transform, table, state, tokens, target):
    def loss_fn(taken):
        return jnp.mean(jnp.sum(jnp.square(taken - target), axis=-1))

    rows = clj.RowUpdates(tokens, jax.grad(loss_fn)(table[tokens]), kind='gradient')
    return update(transform, rows, state, table)


OPTIMIZERS = {'adamw': optax.adamw(1e-3), 'momentum': optax.sgd(1e-3, momentum=0.9)}


@pytest.mark.parametrize('optimizer', some_by_default(OPTIMIZERS, 'adamw'))
def test_an_optimizer_by_rows_updates_table_and_state_in_place(optimizer):
    transform: Any = clj.by_rows(optimizer)

    def program(num_rows):
        table, *batch = shapes(((num_rows, 128), jnp.float32), ((1024,), jnp.int32), ((1024, 128), jnp.float32))
        step = jax.jit(partial(embedding_step, transform), donate_argnums=(0, 1))
        return memory(step, table, jax.eval_shape(transform.init, table), *batch)

    few, most = program(100_000), program(400_000)
    assert few.temp_size_in_bytes == most.temp_size_in_bytes < 4 * MB
    assert most.alias_size_in_bytes >= 2 * 400_000 * 128 * 4


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='JAX 0.10 converts a bfloat16 table to float32 on CPUs')
def test_a_table_in_bfloat16_is_updated_in_place_too():
    few, most = (table_program(one_lookup, c, jnp.bfloat16) for c in (1_000, 1_000_000))
    assert few.temp_size_in_bytes == most.temp_size_in_bytes < 8 * MB
    assert most.alias_size_in_bytes >= 1_000_000 * 512 * 2


def test_a_dense_gradient_is_as_large_as_the_table():
    # An ordinary optimizer needs this, and the tests above would see it.
    arrays = shapes(((256, 64), jnp.float32), ((1_000_000, 64), jnp.float32), ((256,), jnp.int32))
    step = jax.jit(lambda x, table, labels: table - jax.grad(clj.center_loss, 1)(x, table, labels), donate_argnums=1)
    assert memory(step, *arrays).temp_size_in_bytes >= TABLE_BYTES


def test_nearest_center_holds_no_matrix_of_all_distances():
    arrays = shapes(((256, 8), jnp.float32), ((100_000, 8), jnp.float32))
    assert memory(jax.jit(clj.nearest_center), *arrays).temp_size_in_bytes < 4 * 256 * 100_000 / 8


LOGITS_BYTES = 256 * 100_000 * 4
SOFTMAX = {'class': clj.class_softmax, 'margin': clj.margin_softmax, 'distance': clj.distance_softmax}
SOFTMAX_AND_ROWS = [clj.class_softmax_and_rows, clj.margin_softmax_and_rows, clj.distance_softmax_and_rows]


@pytest.mark.parametrize('softmax', some_by_default(SOFTMAX, 'class'))
def test_a_softmax_and_its_gradients_hold_no_matrix_of_all_logits(softmax):
    arrays = shapes(((256, 8), jnp.float32), ((100_000, 8), jnp.float32), ((256,), jnp.int32))
    table_bytes = 100_000 * 8 * 4
    loss_alone, gradients = jax.jit(softmax), jax.jit(jax.grad(softmax, (0, 1)))
    assert memory(loss_alone, *arrays).temp_size_in_bytes < LOGITS_BYTES / 10
    assert memory(gradients, *arrays).temp_size_in_bytes < LOGITS_BYTES / 10 + 3 * table_bytes


def sampled_step(softmax, key, table, x, labels):
    classes = clj.sample_classes(key, labels, len(table), 10_000)
    loss_fn = partial(softmax, table=table, labels=labels, classes=classes)
    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    return table + clj.RowUpdates(rows.indices, -0.1 * rows.values), loss, gradient


@pytest.mark.slow
@pytest.mark.parametrize('softmax', SOFTMAX_AND_ROWS)
def test_a_step_with_sampled_classes_takes_the_memory_of_the_sample(softmax):
    def program(num_classes):
        key = jax.eval_shape(jax.random.key, 0)
        arrays = shapes(((num_classes, 64), jnp.float32), ((256, 64), jnp.float32), ((256,), jnp.int32))
        return memory(jax.jit(partial(sampled_step, softmax), donate_argnums=1), key, *arrays)

    few, most = program(100_000), program(1_000_000)
    assert few.temp_size_in_bytes == most.temp_size_in_bytes < 6 * 10_000 * 64 * 4
    assert most.alias_size_in_bytes >= TABLE_BYTES


def test_check_replicas_reads_a_table_without_a_copy():
    (table,) = shapes(((1, 100_000, 64), jnp.float32))
    assert memory(_tables._checksums, table).temp_size_in_bytes < MB

"""What travels between devices, read from the compiled program: O(B D) numbers, never a table."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support.programs import AS_USERS, collective_sizes, collectives_in_loops
from tests.support.steps import update


def test_collective_sizes_shows_a_table_that_travels():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    total = jax.jit(lambda table: table.sum(), in_shardings=NamedSharding(mesh, P('data')))
    moved = jax.jit(
        lambda table: table * 2,
        in_shardings=NamedSharding(mesh, P('data')),
        out_shardings=NamedSharding(mesh, P()),
    )
    table = jax.ShapeDtypeStruct((100_008, 6), jnp.float32)
    assert collective_sizes(total.lower(table).compile(AS_USERS)) == [1]
    assert max(collective_sizes(moved.lower(table).compile(AS_USERS))) >= 100_008 * 6


def pmapped(fn):
    shapes = ((8, 8, 6), np.float32), ((8, 8), np.int32), ((8, 100_003, 6), np.float32)
    return jax.pmap(fn, axis_name='batch', donate_argnums=2), [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def shard_mapped(fn, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(axis_type,))
    specs = P('batch'), P('batch'), P()
    shapes = ((64, 6), np.float32), ((64,), np.int32), ((100_003, 6), np.float32)
    arrays = [
        jax.ShapeDtypeStruct(*shape, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P()), donate_argnums=2), arrays


@pytest.mark.parametrize(
    'way',
    [pmapped, shard_mapped, partial(shard_mapped, axis_type=AxisType.Explicit)],
    ids=['pmap', 'shard_map', 'shard_map, Explicit'],
)
def test_a_step_under_axis_name_moves_and_copies_no_table(way):
    transform = clj.center_update(0.5, axis_name='batch')

    def step(x, labels, table):
        def loss_fn(x):
            loss, rows = clj.center_loss_and_rows(x, table, labels, axis_name='batch')
            return jax.lax.pmean(loss, 'batch'), rows

        (loss, rows), _ = jax.value_and_grad(loss_fn, has_aux=True)(x)
        return *update(transform, rows, transform.init(table), table), loss

    jitted, arrays = way(step)
    compiled = jitted.lower(*arrays).compile(AS_USERS)
    assert 0 < max(collective_sizes(compiled)) <= 64 * 6
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_003 * 6 * 4 // 10
    assert memory.alias_size_in_bytes >= 100_003 * 6 * 4


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=['Auto', 'Explicit'])
def test_an_optimizer_by_rows_under_axis_name_moves_and_copies_no_table(axis_type):
    transform: Any = clj.by_rows(optax.sgd(0.1), axis_name='batch')

    def step(x, tokens, table):
        gradient = jax.grad(lambda taken: jnp.sum((taken - x) ** 2))(table[tokens])
        return update(transform, clj.RowUpdates(tokens, gradient, kind='gradient'), transform.init(table), table)

    jitted, arrays = shard_mapped(step, axis_type)
    compiled = jitted.lower(*arrays).compile(AS_USERS)
    assert 0 < max(collective_sizes(compiled)) <= 64 * 6
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_003 * 6 * 4 // 10
    assert memory.alias_size_in_bytes >= 100_003 * 6 * 4


def test_an_optimizer_by_rows_moves_no_table_that_a_mesh_shards():
    mesh = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
    transform: Any = clj.by_rows(optax.adam(0.1), mesh=mesh)
    by_class, over_all = NamedSharding(mesh, P('classes')), NamedSharding(mesh, P())
    table = jax.ShapeDtypeStruct((100_000, 6), jnp.float32, sharding=by_class)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_class if a.ndim else over_all),
        jax.eval_shape(transform.init, table),
    )
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=by_class)

    def step(table, state, tokens):
        gradient = jax.grad(lambda taken: jnp.sum(taken**2))(table[tokens])
        return update(transform, clj.RowUpdates(tokens, gradient, kind='gradient'), state, table)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, tokens).compile(AS_USERS)
    assert 0 < max(collective_sizes(compiled)) <= 64 * 6
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 100_000 * 6 * 4 // 8


def step_over_classes(x, table, labels, state, key, transform, num_classes, num_sampled, axes=(), **layout):
    classes = num_sampled and clj.sample_classes(key, labels, num_classes, num_sampled, **layout)

    def loss_fn(x):
        loss, rows = clj.margin_softmax_and_rows(x, table, labels, classes=classes, num_classes=num_classes, **layout)
        return jax.lax.pmean(loss, axes) if axes else loss, rows

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    return *update(transform, rows, state, table), loss, gradient


def by_class_shards(form, axis_type, class_axis, num_classes, num_sampled):
    """Returns the compiled step of 64 examples of 6 features, batch over both axes or, under jit, over 'data'."""
    both = ('data', 'classes')
    mesh = jax.make_mesh((2, 4), both, axis_types=(axis_type,) * 2)
    over_data = both if form == 'shard_map' else 'data'
    layout: dict[str, Any] = {'class_axis': class_axis}
    if form == 'shard_map' and class_axis == 'classes':
        layout['axis_name'] = 'data'
    transform: Any = clj.by_rows(optax.adam(0.1), **layout if form == 'shard_map' else {})
    step: Any = partial(
        step_over_classes, transform=transform, num_classes=num_classes, num_sampled=num_sampled, **layout
    )
    shape = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    table = jax.ShapeDtypeStruct((-(-num_classes // 8) * 8, 6), np.float32)
    state = jax.eval_shape(clj.by_rows(optax.adam(0.1)).init, table)
    of_state = jax.tree.map(lambda a: P(class_axis) if a.ndim else P(), state)
    specs = P(over_data), P(class_axis), P(over_data), of_state, P()
    if form == 'shard_map':
        out = P(class_axis), of_state, P(), P(over_data)
        step = jax.shard_map(partial(step, axes=both), mesh=mesh, in_specs=specs, out_specs=out)
    x, labels = jax.ShapeDtypeStruct((64, 6), np.float32), jax.ShapeDtypeStruct((64,), np.int32)
    arrays = x, table, labels, state, jax.eval_shape(jax.random.key, 0)
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(shape, arrays, specs)
        return jax.jit(step, donate_argnums=(1, 3)).lower(*shapes).compile(AS_USERS)


FORMS = [
    ('jit', AxisType.Explicit, 'classes'),
    pytest.param('jit', AxisType.Auto, 'classes', marks=pytest.mark.slow),
    pytest.param('jit', AxisType.Auto, ('data', 'classes'), marks=pytest.mark.slow),
    pytest.param('shard_map', AxisType.Auto, 'classes', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('form', 'axis_type', 'class_axis'), FORMS)
def test_a_step_over_sharded_classes_moves_no_row(form: str, axis_type: Any, class_axis: Any):
    num_classes, num_sampled = 400_003, 4096
    compiled = by_class_shards(form, axis_type, class_axis, num_classes, num_sampled)
    assert 0 < max(collective_sizes(compiled)) <= 64 * 6
    assert not collectives_in_loops(compiled)
    memory: Any = compiled.memory_analysis()
    shard = -(-num_classes // 8) * 8 * 6 * 4 // (8 if class_axis != 'classes' else 4)
    assert memory.alias_size_in_bytes >= 3 * shard
    assert memory.temp_size_in_bytes < shard
    if form == 'shard_map':
        over_all = by_class_shards(form, axis_type, class_axis, 4099, None)
        assert 0 < max(collective_sizes(over_all)) <= 64 * 6

"""jit over a mesh: the one-device step on a sharded batch. However the table lies, it never travels."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding
from problems import make_problem
from steps import linen_state, linen_step, linen_table, make_batch

import centerloss_jax as clj

# Far more classes than examples: a tiny table XLA may well choose to gather.
B, D, C = 64, 6, 4096


def step(table, state, x, labels, mesh=None):
    def loss_fn(x):
        return clj.center_loss_and_rows(x, table, labels)

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    updates, state = clj.center_update(0.5, mesh=mesh).update(rows, state, table)
    return optax.apply_updates(table, updates), state, loss, gradient


def make_arrays():
    x, table, labels, _ = make_problem(leading=(B,), num_classes=C, num_features=D, dtype=np.float32)
    labels[::7] = -1
    labels[:8], x[5] = -1, np.nan  # the first of eight devices counts nothing
    return table, clj.center_update().init(table), x, labels


@pytest.fixture(scope='module')
def one_device():
    arrays = make_arrays()
    return arrays, jax.jit(step)(*arrays)


SHAPE = re.compile(r'\w+\[([\d,]*)\]')
COLLECTIVE = re.compile(
    r'= (\([^=]*?\)|\S+) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
)


def collective_sizes(compiled):
    """The numbers of elements that the program's collectives carry, in the order of its text."""
    return [
        int(np.prod([int(n) for n in dimensions.split(',') if n]))
        for shapes in COLLECTIVE.findall(compiled.as_text())
        for dimensions in SHAPE.findall(shapes)
    ]


def test_a_table_that_travels_is_seen():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    total = jax.jit(lambda table: table.sum(), in_shardings=NamedSharding(mesh, P('data')))
    moved = jax.jit(
        lambda table: table * 2,
        in_shardings=NamedSharding(mesh, P('data')),
        out_shardings=NamedSharding(mesh, P()),
    )
    table = jax.ShapeDtypeStruct((C, D), jnp.float32)
    assert collective_sizes(total.lower(table).compile()) == [1]
    assert max(collective_sizes(moved.lower(table).compile())) >= C * D


LAYOUTS = {
    'replicated': ((8,), P()),
    'by rows': ((8,), P('data', None)),
    'two axes, replicated': ((2, 4), P()),
    'two axes, by rows': ((2, 4), P('classes', None)),
    'two axes, by rows along the batch': ((2, 4), P('data', None)),
    'two axes, by rows over both': ((2, 4), P(('data', 'classes'), None)),
}
MESHES = {
    'Auto, mesh=': (AxisType.Auto, 'argument'),
    'Auto, set_mesh': (AxisType.Auto, 'set_mesh'),
    'Explicit': (AxisType.Explicit, 'nothing'),
}


@pytest.mark.parametrize(('shape', 'spec'), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(('axis_type', 'named_by'), MESHES.values(), ids=MESHES.keys())
def test_the_step_is_that_of_one_device_and_moves_no_table(one_device, shape, spec, axis_type, named_by):
    (table, state, x, labels), expected = one_device
    mesh = jax.make_mesh(shape, ('data', 'classes')[: len(shape)], axis_types=(axis_type,) * len(shape))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    arrays = put(table, spec), put(state, P()), put(x, P('data')), put(labels, P('data'))
    lowered = partial(step, mesh=mesh if named_by == 'argument' else None)
    with jax.set_mesh(mesh if named_by == 'set_mesh' else jax.sharding.get_mesh()):
        compiled = jax.jit(lowered, donate_argnums=0).lower(*arrays).compile()
        moved, state, loss, gradient = compiled(*arrays)

    for got, want in zip(jax.tree.leaves((moved, loss, gradient)), expected[:1] + expected[2:], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    chex.assert_trees_all_close(state, expected[1], rtol=1e-6)
    assert moved.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    sizes = collective_sizes(compiled)
    # A row-sharded table of eight parts still has more elements in each than the batch has.
    assert sizes
    assert max(sizes) <= 2 * B * D < C * D // 8


def test_a_mesh_of_auto_axes_that_nobody_names_gives_the_right_answer():
    # It moves the table, though, which is XLA's choice: the mesh is for that.
    table, state, x, labels = make_arrays()
    x[[20, 60]], labels[33] = np.inf, C
    expected = jax.jit(step)(table, state, x, labels)
    assert expected[1].left_out == 3
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    x, labels = jax.device_put((x, labels), NamedSharding(mesh, P('data')))
    table, state = jax.device_put((table, state), NamedSharding(mesh, P()))
    moved, state, _, _ = jax.jit(step)(table, state, x, labels)
    np.testing.assert_allclose(moved, expected[0], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
    chex.assert_trees_all_close(state, expected[1], rtol=1e-6)


@pytest.mark.parametrize('spec', [P(), P('data', None)], ids=['replicated', 'by rows'])
def test_the_linen_step_on_a_mesh_is_that_of_one_device(spec):
    images, labels = make_batch(size=64, num_classes=16, left_out=range(8))
    state = linen_state(optax.sgd(0.1), num_classes=16)
    expected, expected_loss = jax.jit(linen_step)(state, images, labels)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    layout = jax.tree.map(lambda leaf: NamedSharding(mesh, spec if jnp.shape(leaf) == (16, 3) else P()), state)
    with jax.set_mesh(mesh):
        batch = jax.device_put((images, labels), NamedSharding(mesh, P('data')))
        got, loss = jax.jit(linen_step, donate_argnums=0)(jax.device_put(state, layout), *batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    chex.assert_trees_all_close(got.params, expected.params, rtol=1e-5, atol=1e-6)
    assert linen_table(got).sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)

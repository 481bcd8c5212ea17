"""Softmax losses over a table that lies over devices: losses, gradients and tables are those of one device."""

from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P, export
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support.steps import update

B, D, C, ROWS = 16, 4, 21, 24  # eight devices have three rows each, the last one three of padding
BOTH = ('data', 'classes')
rng = np.random.default_rng(0)
X = rng.normal(size=(B, D)).astype(np.float32)
TABLE = rng.normal(size=(C, D)).astype(np.float32)
PADDED = np.pad(TABLE, ((0, ROWS - C), (0, 0)), constant_values=np.inf)
SAMPLE = np.flatnonzero(np.arange(ROWS) % 3 != 2).astype(np.int32)  # two rows of each device, padding among them
LABELS = rng.choice(SAMPLE[SAMPLE < C], B).astype(np.int32)
LABELS[2:4], LABELS[10] = -1, -1  # one device has no examples, another has one
LOSS = partial(clj.distance_softmax_and_rows, temperature=3.0, margin=0.2, center_weight=0.3, weight=1.7, block_size=2)
ADAM = optax.adam(0.1)


class Results(NamedTuple):
    losses: Any  # over all classes, over a sample, and without rows
    for_x: Any  # of each
    for_table: Any  # of the loss without rows
    table: Any  # after two steps
    moments: Any
    norm: Any  # of the second step


def steps(transform, x, table, labels, sample, axes=(), **layout):
    """Takes a step over all classes and one over a sample. Returns the loss without rows at the end too."""
    state, results = transform.init(table), []
    for classes in (None, sample):

        def loss_fn(x, table=table, classes=classes):
            loss, rows = LOSS(x, table, labels, classes=classes, num_classes=C, **layout)
            return jax.lax.pmean(loss, axes) if axes else loss, rows

        (loss, rows), for_x = jax.value_and_grad(loss_fn, has_aux=True)(x)
        table, state = update(transform, rows, state, table)
        results.append((loss, for_x))

    def plain(x, table):
        loss = clj.margin_softmax(x, table, labels, scale=4.0, block_size=2, num_classes=C, **layout)
        return jax.lax.pmean(loss, axes) if axes else loss

    loss, (for_x, for_table) = jax.value_and_grad(plain, (0, 1))(x, table)
    losses, for_each_x = zip(*results, (loss, for_x), strict=True)
    return Results(losses, for_each_x, for_table, table, optax.tree.get(state, 'mu'), state.update_norm)


@cache
def one_device() -> Results:
    return jax.jit(partial(steps, clj.by_rows(ADAM)))(X, TABLE, LABELS, SAMPLE[SAMPLE < C])


def by_pmap(class_axis):
    del class_axis
    transform = clj.by_rows(ADAM, class_axis='all')
    step = jax.pmap(partial(steps, transform, axes='all', class_axis='all'), axis_name='all')
    arrays = [a.reshape(8, -1, *a.shape[1:]) for a in (X, PADDED, LABELS)]
    got = step(*arrays, SAMPLE.reshape(8, 2) - 3 * np.arange(8, dtype=np.int32)[:, None])
    whole = jax.tree.map(lambda a: a.reshape(-1, D) if a.ndim == 3 else a, got)
    # JAX differentiates the sum of the losses of all devices.
    return whole._replace(
        losses=[loss[3] for loss in got.losses],
        for_x=[gradient / 8 for gradient in whole.for_x],
        for_table=whole.for_table / 8,
        norm=got.norm[3],
    )


def by_shard_map(class_axis):
    mesh = make_mesh(AxisType.Explicit)
    others = None if class_axis == BOTH else 'data'
    transform = clj.by_rows(ADAM, axis_name=others, class_axis=class_axis)

    def local(x, table, labels, sample):
        sample -= jax.lax.axis_index(class_axis) * len(table)
        return steps(transform, x, table, labels, sample, BOTH, axis_name=others, class_axis=class_axis)

    in_specs = P(BOTH), P(class_axis), P(BOTH), P(class_axis)
    out_specs = Results(P(), P(BOTH), P(class_axis), P(class_axis), P(class_axis), P())
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    arrays = zip((X, PADDED, LABELS, SAMPLE), in_specs, strict=True)
    return mapped(*(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in arrays))


def by_jit(class_axis, axis_type):
    mesh = make_mesh(axis_type)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    arrays = put(X, P('data')), put(PADDED, P(class_axis)), put(LABELS, P('data')), put(SAMPLE, P(class_axis))
    named = {'class_axis': class_axis} if axis_type == AxisType.Auto else {}
    with jax.set_mesh(mesh):
        got = jax.jit(partial(steps, clj.by_rows(ADAM), **named))(*arrays)
    by_class = NamedSharding(mesh, P(class_axis))
    assert got.table.sharding.is_equivalent_to(by_class, 2)
    assert got.moments.sharding.is_equivalent_to(by_class, 2)
    return got


def make_mesh(axis_type):
    return jax.make_mesh((2, 4), BOTH, axis_types=(axis_type,) * 2)


WAYS = {
    'pmap': by_pmap,
    'shard_map': by_shard_map,
    'Auto': partial(by_jit, axis_type=AxisType.Auto),
    'Explicit': partial(by_jit, axis_type=AxisType.Explicit),
}
CASES = [
    pytest.param(way, axis, id=f'{name}, {axis}')
    for name, way in WAYS.items()
    for axis in (BOTH, 'classes')
    if (name, axis) != ('pmap', 'classes')
]


@pytest.mark.parametrize(('way', 'class_axis'), CASES)
def test_losses_gradients_and_tables_are_those_of_one_device(way, class_axis):
    expected, got = jax.device_get((one_device(), way(class_axis)))
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(got.norm, expected.norm, rtol=1e-6)
    for_x = zip(got.for_x, expected.for_x, strict=True)
    of_classes = [(got[k][:C], expected[k]) for k in (2, 3, 4)]
    for a, b in [*for_x, *of_classes]:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    np.testing.assert_array_equal(got.table[C:], PADDED[C:])
    np.testing.assert_array_equal(got.for_table[C:], np.zeros((3, D)))

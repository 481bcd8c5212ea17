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
from tests.support.cases import some_by_default
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
LAYOUTS = {
    f'{name}, {"both axes" if axis == BOTH else axis}': (way, axis)
    for name, way in WAYS.items()
    for axis in (BOTH, 'classes')
    if (name, axis) != ('pmap', 'classes')
}


@pytest.mark.parametrize(
    ('way', 'class_axis'),
    some_by_default(LAYOUTS, 'pmap, both axes', 'shard_map, classes', 'Auto, both axes', 'Explicit, classes'),
)
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


def test_a_replicated_table_needs_the_axis_of_the_batch_alone(per_device):
    transform = clj.by_rows(ADAM, axis_name='batch')

    def step(batch, table):
        x, labels = batch

        def loss_fn(x, scale):
            loss, rows = clj.margin_softmax_and_rows(x, table, labels, scale=scale, axis_name='batch')
            return jax.lax.pmean(loss, 'batch'), rows

        (loss, rows), (for_x, for_scale) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(x, 4.0)
        moved, _ = update(transform, rows, transform.init(table), table)
        return loss, for_x, jax.lax.pmean(for_scale, 'batch'), moved

    loss, for_x, for_scale, moved = per_device(step, (X.reshape(2, 8, D), LABELS.reshape(2, 8)), TABLE)
    one = lambda x, scale: clj.margin_softmax_and_rows(x, TABLE, LABELS, scale=scale)  # noqa: E731
    (expected, rows), gradients = jax.jit(jax.value_and_grad(one, (0, 1), has_aux=True))(X, 4.0)
    alone = clj.by_rows(ADAM)
    table, _ = jax.jit(partial(update, alone))(rows, alone.init(TABLE), TABLE)
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-6)
    np.testing.assert_allclose(for_scale, [gradients[1]] * 2, rtol=1e-5)
    for device in range(2):
        np.testing.assert_allclose(moved[device], table, rtol=0, atol=1e-6 * np.abs(table).max())
    ratio = 1 if np.allclose(for_x.reshape(B, D), gradients[0], atol=1e-6) else 2  # pmap and vmap add the losses
    np.testing.assert_allclose(for_x.reshape(B, D) / ratio, gradients[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('check_vma', some_by_default({'checked': True, 'unchecked': False}, 'checked'))
def test_numbers_have_the_derivatives_of_one_device_in_both_modes(check_vma):
    mesh = make_mesh(AxisType.Auto)

    def loss_of(numbers, x=X, table=TABLE, labels=LABELS, **layout):
        scale, weight = numbers
        return clj.margin_softmax_and_rows(
            x, table, labels, scale=scale, weight=weight, num_classes=C, block_size=2, **layout
        )[0]

    def local(x, table, labels):
        def loss_fn(numbers):
            return jax.lax.pmean(loss_of(numbers, x, table, labels, axis_name='data', class_axis='classes'), BOTH)

        _, along = jax.jvp(loss_fn, ((4.0, 1.5),), ((1.0, 2.0),))
        return along, jax.lax.pmean(jax.grad(loss_fn)((4.0, 1.5)), BOTH)

    specs = P(BOTH), P('classes'), P(BOTH)
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma))(
        X, PADDED, LABELS
    )
    expected = jax.jvp(loss_of, ((4.0, 1.5),), ((1.0, 2.0),))[1], jax.grad(loss_of)((4.0, 1.5))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_rows_beyond_the_classes_get_no_logit_and_no_label():
    loss, rows = jax.jit(partial(LOSS, num_classes=C))(X, PADDED, LABELS)
    np.testing.assert_allclose(loss, one_device().losses[0], rtol=1e-6)
    np.testing.assert_array_equal(rows.indices, [*range(C), -1, -1, -1])
    np.testing.assert_array_equal(rows.values[C:], np.zeros((3, D)))
    labels = np.where(np.arange(B) == 1, C, LABELS)
    assert jnp.isnan(jax.jit(partial(clj.class_softmax, num_classes=C))(X, PADDED, labels))
    with pytest.raises(ValueError, match=rf'labels\[1\] is {C}, but there are {C} classes'):
        clj.class_softmax(X, PADDED, labels, num_classes=C)


MESH = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
BY_CLASS = NamedSharding(MESH, P('classes'))


@pytest.mark.parametrize(('num_classes', 'num_sampled'), [(1003, 128), (75, 64)], ids=['drawn', 'permuted'])
def test_each_device_draws_its_share_of_its_own_classes(num_classes, num_sampled):
    key, num_rows, share = jax.random.key(1), -(-num_classes // 8), num_sampled // 8
    labels = np.array([0, 3, 3, -1, num_classes - 1, 40, 41, 42], np.int32)
    sample = clj.sample_classes(key, labels, num_classes, num_sampled, class_axis='classes', mesh=MESH)
    assert sample.sharding.is_equivalent_to(BY_CLASS, 1)
    sample = np.asarray(sample)
    assert (np.diff(sample) > 0).all()
    np.testing.assert_array_equal(sample // num_rows, np.repeat(np.arange(8), share))
    assert set(labels[labels >= 0]) <= set(sample)
    # Only the last device has fewer classes than its share, and only it takes padding.
    last = num_classes - 7 * num_rows
    assert (sample >= num_classes).sum() == max(0, share - last)

    def local(key, labels):
        return clj.sample_classes(key, labels, num_classes, num_sampled, class_axis='classes')

    mapped = jax.shard_map(local, mesh=MESH, in_specs=(P(), P('classes')), out_specs=P('classes'))
    first = num_rows * np.repeat(np.arange(8), share)
    np.testing.assert_array_equal(first + np.asarray(jax.jit(mapped)(key, labels)), sample)


def test_devices_that_hold_the_same_rows_draw_the_same_classes():
    def local(key, labels):
        return clj.sample_classes(key, labels, 101, 40, axis_name='data', class_axis='classes')

    specs: dict[str, Any] = {'in_specs': (P(), P(BOTH)), 'out_specs': P('classes')}
    mapped = jax.jit(jax.shard_map(local, mesh=make_mesh(AxisType.Auto), **specs))  # the check asks for equal ones
    labels = np.array([0, 25, 26, 100, -1, 26, 60, 61], np.int32)
    sample = np.asarray(mapped(jax.random.key(0), labels)) + 26 * np.repeat(np.arange(4), 10)
    assert set(labels[labels >= 0]) <= set(sample)


def test_a_sample_of_all_rows_gives_the_loss_over_all_classes():
    def loss(key, table):
        classes = clj.sample_classes(key, LABELS, C, ROWS, class_axis='classes')
        return LOSS(X, table, LABELS, classes=classes, num_classes=C, class_axis='classes')

    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        value, rows = jax.jit(loss)(jax.random.key(0), jax.device_put(PADDED, NamedSharding(mesh, P('classes'))))
    np.testing.assert_allclose(value, one_device().losses[0], rtol=1e-6)
    np.testing.assert_array_equal(rows.indices, [*range(C), -1, -1, -1])


def sharded_rows(table):
    _, rows = clj.class_softmax_and_rows(X, table, LABELS, num_classes=C, class_axis='classes', mesh=MESH)
    return rows


def test_sharded_rows_are_added_and_joined_where_they_lie():
    transform = clj.by_rows(optax.sgd(1.0))

    def add_and_join(table):
        rows = sharded_rows(table)
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), rows)
        twice = clj.concatenate_rows(stacked, rows)
        moved, _ = update(transform, twice, transform.init(table), table)
        return rows, twice, table + rows, moved, table.astype(jnp.bfloat16) + rows

    rows, twice, once, moved, narrow = jax.jit(add_and_join)(jax.device_put(PADDED, BY_CLASS))
    assert rows.sharding == twice.sharding == BY_CLASS
    assert all(a.sharding.is_equivalent_to(BY_CLASS, 2) for a in (twice.values, once, moved, narrow))
    _, expected = clj.class_softmax_and_rows(X, TABLE, LABELS)
    gradient = np.asarray(expected.values)
    np.testing.assert_allclose(once[:C], TABLE + gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved[:C], TABLE - 3 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(narrow[:C], jnp.asarray(TABLE, jnp.bfloat16) + expected)


def test_a_row_on_the_wrong_device_is_dropped_and_counted():
    table = jax.device_put(np.ones((ROWS, D), np.float32), BY_CLASS)
    index = np.array([0, 3, 6, 8, -1, 24, 18, 21], np.int32)  # the fourth device has row 9 to 11
    rows = clj.RowUpdates(index, np.ones((8, D), np.float32), sharding=BY_CLASS)
    transform = clj.by_rows(optax.sgd(1.0))
    moved, state = jax.jit(partial(update, transform))(rows, transform.init(table), table)
    assert state.rows_dropped == 2
    np.testing.assert_array_equal(np.flatnonzero((np.asarray(moved) == 0).all(axis=1)), [0, 3, 6, 18, 21])


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
def test_init_under_jit_lays_the_state_out_as_the_table(axis_type):
    mesh = make_mesh(axis_type)
    by_class = NamedSharding(mesh, P('classes', None))
    table = {'a': jax.device_put(PADDED, by_class), 'b': jax.device_put(PADDED[:8], NamedSharding(mesh, P()))}
    state = jax.jit(clj.by_rows(ADAM).init)(table)
    for moments in optax.tree.get(state, 'mu'), optax.tree.get(state, 'nu'):
        assert moments['a'].sharding.is_equivalent_to(by_class, 2)
        assert moments['b'].sharding.is_fully_replicated


def test_exported_rows_keep_the_names_of_their_axes():
    table = jax.device_put(PADDED, BY_CLASS)
    exported = export.export(jax.jit(lambda table, rows: table + rows))(table, sharded_rows(table))
    restored = export.deserialize(exported.serialize())
    (_, rows), _ = restored.in_tree.unflatten(range(restored.in_tree.num_leaves))
    assert rows.sharding.spec == P('classes')
    assert rows.sharding.mesh.shape == {'classes': 8}


def test_tables_of_two_layouts_need_an_optimizer_each():
    tables = {'a': jax.device_put(PADDED, BY_CLASS), 'b': jnp.asarray(TABLE)}
    rows = {'a': sharded_rows(tables['a']), 'b': clj.class_softmax_and_rows(X, TABLE, LABELS)[1]}
    transform = clj.by_rows(ADAM)
    with pytest.raises(ValueError, match=r'tables of one by_rows.*optax\.partition'):
        transform.update(rows, transform.init(tables), tables)


def test_a_mesh_or_an_axis_of_jit_inside_of_pmap_is_an_error():
    def mapped(**layout):
        return jax.pmap(lambda x, labels: clj.class_softmax(x, TABLE, labels, **layout), axis_name='batch')

    batch = X.reshape(8, 2, D), LABELS.reshape(8, 2)
    with pytest.raises(ValueError, match=r'mesh goes with jax\.jit'):
        mapped(class_axis='batch', mesh=MESH)(*batch)
    with pytest.raises(ValueError, match=r'axis_name=.*class_axis=.*is none'):
        mapped(axis_name='batch', class_axis='classes', mesh=MESH)(*batch)


def test_an_axis_that_is_not_that_of_the_type_is_an_error():
    table = jax.device_put(PADDED, NamedSharding(make_mesh(AxisType.Explicit), P('classes')))
    with pytest.raises(ValueError, match=r"class_axis is \('data',\), but the rows of the table lie over"):
        clj.class_softmax(X, table, LABELS, class_axis='data')

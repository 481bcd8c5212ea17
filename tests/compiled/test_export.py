"""Every public function and whole train steps lower for GPUs and TPUs, on a machine that has neither.

They can be exported with symbolic sizes too, and saved with their rows and states.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import centerloss_jax as clj
from tests.support.cases import some_by_default
from tests.support.steps import linen_state, linen_step, make_batch, nnx_pair, nnx_step, update

PLATFORMS = ['cuda', 'tpu']


def lowered_for_both(function, *arguments):
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    return exported.platforms == tuple(PLATFORMS) and len(exported.mlir_module_serialized) > 0


def table_step(x, table, labels):
    rows = clj.center_rows(x, table, labels)
    schedule: Any = optax.linear_schedule(1.0, 0.0, 10)
    transform = clj.center_update(schedule)
    return update(transform, rows, transform.init(table), table)


def model_step(x, table, labels):
    model = {'params': jnp.ones(3), 'centers': table}
    transform = clj.with_centers(optax.adam(1e-3))
    rows = clj.concatenate_rows(*[clj.center_rows(x, table, labels)] * 2)
    return update(transform, {'params': jnp.ones(3), 'centers': rows}, transform.init(model), model)


def row_step(x, table, labels):
    transform = clj.by_rows(optax.adamw(1e-3))
    return update(transform, clj.RowUpdates(labels, x, kind='gradient'), transform.init(table), table)


def sampled_step(x, table, labels):
    classes = clj.sample_classes(jax.random.key(0), labels, len(table), len(table) - 2)
    return clj.margin_softmax_and_rows(x, table, labels, classes=classes)


def statistics(x, table, labels):
    total = clj.class_statistics(x, labels, len(table))
    total = total.merge(clj.class_statistics(2 * x, labels, len(table)))
    return total, total.intra, total.inter, total.ratio


def linen_module(x, table, labels):
    return clj.linen.CenterLoss(len(table)).apply({'centers': {'centers': table}}, x, labels)


def linen_softmax(x, table, labels):
    return clj.linen.SoftmaxLoss(len(table)).apply({'classifier': {'table': table}}, x, labels)


def nnx_softmax(x, table, labels):
    return clj.nnx.SoftmaxLoss(*table.shape, table_init=lambda *_: table, rngs=nnx.Rngs(0))(x, labels)


def nnx_module(x, table, labels):
    center = clj.nnx.CenterLoss(*table.shape, centers_init=lambda *_: table, rngs=nnx.Rngs(0))
    return center(x, labels)


FUNCTIONS = {
    'center_loss': clj.center_loss,
    'its gradients': jax.grad(clj.center_loss, (0, 1)),
    'center_loss with options': lambda x, table, labels: clj.center_loss(
        x, table, labels, where=labels > 1, weights=x, reduce_fn=None
    ),
    'center_rows': clj.center_rows,
    'center_loss_and_rows': clj.center_loss_and_rows,
    'RowUpdates': lambda x, table, labels: table + clj.RowUpdates(labels, x),
    'center_update': table_step,
    'with_centers and concatenate_rows': model_step,
    'by_rows': row_step,
    'class_softmax': jax.grad(clj.class_softmax, (0, 1)),
    'margin_softmax': jax.grad(clj.margin_softmax, (0, 1)),
    'distance_softmax': jax.grad(clj.distance_softmax, (0, 1)),
    'class_softmax_and_rows': clj.class_softmax_and_rows,
    'distance_softmax_and_rows': partial(clj.distance_softmax_and_rows, center_weight=0.1),
    'margin_softmax_and_rows and sample_classes': sampled_step,
    'nearest_center': lambda x, table, labels: clj.nearest_center(x, table, block_size=4),
    'class_statistics': statistics,
    'linen.CenterLoss': linen_module,
    'nnx.CenterLoss': nnx_module,
    'linen.SoftmaxLoss': linen_softmax,
    'nnx.SoftmaxLoss': nnx_softmax,
}


@pytest.mark.parametrize('dtype', some_by_default({'float32': jnp.float32, 'bfloat16': jnp.bfloat16}, 'float32'))
@pytest.mark.parametrize('function', FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_function_lowers(function, dtype):
    x, table = jax.ShapeDtypeStruct((7, 3), dtype), jax.ShapeDtypeStruct((11, 3), dtype)
    assert lowered_for_both(function, x, table, jax.ShapeDtypeStruct((7,), jnp.int32))


def test_every_public_name_is_here():
    # What is missing runs on the host, or is a type that the functions above return.
    on_the_host = {'check_labels', 'check_replicas', 'shard_centers', 'unshard_centers'}
    returned = {'ByRowsState', 'CenterUpdateState', 'ClassStatistics'}
    lowered = {word for name in FUNCTIONS for word in name.replace('.', ' ').split()}
    assert set(clj.__all__) - lowered == on_the_host | returned


@pytest.mark.parametrize('batch_norm', some_by_default({'plain': False, 'BatchNorm': True}, 'BatchNorm'))
def test_the_linen_train_step_lowers(batch_norm):
    state, batch = linen_state(batch_norm=batch_norm), make_batch()

    # An export knows arrays, and not the functions that a TrainState carries.
    def step(arrays, images, labels):
        new, loss = linen_step(jax.tree.unflatten(jax.tree.structure(state), arrays), images, labels)
        return jax.tree.leaves(new), loss

    assert lowered_for_both(step, jax.tree.leaves(state), *batch)


@pytest.mark.parametrize('batch_norm', [False, True], ids=['plain', 'BatchNorm'])
def test_the_nnx_train_step_lowers(batch_norm):
    graphdef, state = nnx.split(nnx_pair(batch_norm=batch_norm))

    def step(arrays, images, labels):
        model, optimizer = nnx.merge(graphdef, arrays)
        loss = nnx_step(model, optimizer, images, labels)
        return nnx.to_pure_dict(nnx.state((model, optimizer))), loss

    assert lowered_for_both(step, nnx.to_pure_dict(state), *make_batch())


def test_the_step_of_several_devices_lowers():
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    state, batch = linen_state(axis_name='batch'), make_batch(size=64)

    def step(arrays, images, labels):
        restored = jax.tree.unflatten(jax.tree.structure(state), arrays)
        new, loss = linen_step(restored, images, labels, axis_name='batch')
        return jax.tree.leaves(new), loss

    specs = (jax.P(), jax.P('batch'), jax.P('batch'))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.P())
    assert lowered_for_both(mapped, jax.tree.leaves(state), *batch)


def symbolic(batch, classes):
    """Returns shapes of x, table and labels; a size is a number or the name of a symbol."""
    names = ', '.join(size for size in (batch, classes) if isinstance(size, str))
    symbols = dict(zip(names.split(', '), jax.export.symbolic_shape(names), strict=True))
    b, c = (symbols[size] if isinstance(size, str) else size for size in (batch, classes))
    return [jax.ShapeDtypeStruct(*a) for a in (((b, 3), jnp.float32), ((c, 3), jnp.float32), ((b,), jnp.int32))]


SIZES = {'batch': ('b', 4), 'many classes': ('b', 1000), 'classes': (7, 'c'), 'both': ('b', 'c')}


def moved(x, table, labels):
    return table_step(x, table, labels)[0]


def loss_and_sum(x, table, labels):
    loss, rows = clj.center_loss_and_rows(x, table, labels)
    return loss, table + rows


@pytest.mark.parametrize(('batch', 'classes'), some_by_default(SIZES, 'both'))
@pytest.mark.parametrize('function', [clj.center_loss, loss_and_sum, moved], ids=['loss', 'rows', 'update'])
def test_an_export_with_symbolic_sizes_gives_the_result_of_each_size(function, batch, classes):
    exported = jax.export.export(jax.jit(function))(*symbolic(batch, classes))
    for symbols in ({'b': 7, 'c': 4}, {'b': 3, 'c': 1000}):
        num_examples, num_classes = (symbols[size] if isinstance(size, str) else size for size in (batch, classes))
        rng = np.random.default_rng(num_examples)
        x, table = (rng.normal(size=(size, 3)).astype(np.float32) for size in (num_examples, num_classes))
        labels = rng.integers(-1, 4, num_examples).astype(np.int32)
        got, expected = exported.call(x, table, labels), jax.jit(function)(x, table, labels)
        chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32'])
def test_a_label_beyond_a_symbolic_number_of_classes_is_a_mistake(dtype):
    x, table, _ = symbolic('b', 'c')
    (batch,) = jax.export.symbolic_shape('b', scope=x.shape[0].scope)
    labels = jax.ShapeDtypeStruct((batch,), dtype)
    exported = jax.export.export(jax.jit(partial(clj.center_loss, reduce_fn=None)))(x, table, labels)
    got = exported.call(np.ones((3, 3), np.float32), np.zeros((5, 3), np.float32), np.array([4, 5, 100], dtype))
    np.testing.assert_array_equal(got, [3, np.nan, np.nan])


@pytest.mark.parametrize('name', ['center_update', 'by_rows'])
def test_a_serialized_step_takes_and_returns_rows_and_its_state(name):
    pytest.importorskip('flatbuffers')  # JAX serializes by it, and does not depend on it
    # JAX serializes no state of optax.
    stateless: Any = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (updates, state)
    )
    transform: Any = {'center_update': clj.center_update(0.5), 'by_rows': clj.by_rows(stateless)}[name]
    kind = 'centers' if name == 'center_update' else 'gradient'

    def step(rows, state, table):
        updates, state = transform.update(rows, state, table)
        return updates, state, optax.apply_updates(table, updates)

    table, labels = jnp.zeros((5, 3)), jnp.array([0, 2, 2, -1])
    arguments = clj.RowUpdates(labels, -jnp.ones((4, 3)), kind=kind), transform.init(table), table
    exported = jax.export.export(jax.jit(step))(*arguments)
    restored = jax.export.deserialize(exported.serialize())
    updates, state, _ = got = restored.call(*arguments)
    assert isinstance(updates, clj.RowUpdates)
    assert updates.kind == kind
    assert type(state) is type(arguments[1])
    chex.assert_trees_all_equal(got, jax.jit(step)(*arguments))

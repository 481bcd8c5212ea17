"""Every function works where JAX promotes neither dtypes nor ranks by itself, in half precision too."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support.cases import some_by_default
from tests.support.steps import move, update

LABELS, WHERE = np.array([0, 1, 1, 4, -1, 2]), np.array([True, True, False, True, True, True])


def gradients(x, centers, weights):
    def total(x, centers, weights):
        loss, _ = clj.center_loss_and_rows(x, centers, LABELS, weights=weights, where=WHERE)
        return loss + clj.center_loss(x, centers, LABELS)

    return jax.grad(total, (0, 1, 2))(x, centers, weights), jax.jvp(total, (x, centers, weights), (x, centers, weights))


def model_step(x, centers, _):
    transform = clj.with_centers(optax.sgd(0.1), optax.linear_schedule(1.0, 0.0, 10))
    params = jnp.ones(3, jnp.float32)
    model = {'params': params, 'centers': centers}
    rows = clj.concatenate_rows(*[clj.center_rows(x, centers, LABELS)] * 2)
    return update(transform, {'params': params, 'centers': rows}, transform.init(model), model)


def statistics(x, centers, _):
    stats = clj.class_statistics(x, LABELS, len(centers), where=WHERE)
    return stats, stats.intra, stats.inter, stats.ratio, stats.merge(stats)


def distance_softmax(x, centers, _):
    classes = clj.sample_classes(jax.random.key(0), LABELS, len(centers), min(6, len(centers)))

    def total(x, centers):
        return clj.distance_softmax_and_rows(x, centers, LABELS, classes=classes, center_weight=0.1, temperature=2)

    return jax.value_and_grad(total, has_aux=True)(x, centers)


def over_devices(x, centers, _):
    def local(x, labels, centers):
        loss, rows = clj.center_loss_and_rows(x, centers, labels, axis_name='data')
        transform = clj.center_update(0.5, axis_name='data')
        moved, _ = update(transform, rows, transform.init(centers), centers)
        return jax.lax.pmean(loss, 'data'), moved, clj.class_statistics(x, labels, len(centers), axis_name='data').ratio

    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P('data'), P('data'), P()), out_specs=P())
    return mapped(x, jnp.asarray(LABELS), centers)


CALLS: dict[str, Any] = {
    'center_loss': lambda x, c, _: clj.center_loss(x, c, LABELS, where=WHERE),
    'center_loss, weighted': lambda x, c, w: clj.center_loss(x, c, LABELS, weights=w, reduce_fn=jnp.sum),
    'gradients': gradients,
    'center_update': lambda x, c, w: move(c, clj.center_rows(x, c, LABELS, weights=w)),
    'table + rows': lambda x, c, _: c + clj.center_rows(x, c, LABELS),
    'table + bare rows': lambda x, c, _: c + clj.RowUpdates(LABELS, x),
    'with_centers': model_step,
    'concatenate_rows': lambda x, c, _: clj.concatenate_rows(clj.center_rows(x, c, LABELS)),
    'nearest_center': lambda x, c, _: clj.nearest_center(x, c, block_size=4),
    'gradient of nearest_center': lambda x, c, _: jax.grad(lambda x: jnp.sum(clj.nearest_center(x, c)[1]))(x),
    'class_softmax': lambda x, c, _: jax.value_and_grad(clj.class_softmax, (0, 1))(x, c, LABELS, where=WHERE),
    'margin_softmax': lambda x, c, _: jax.value_and_grad(clj.margin_softmax, (0, 1))(x, c, LABELS, angular_margin=0.5),
    'margin_softmax_and_rows': lambda x, c, _: clj.margin_softmax_and_rows(x, c, LABELS, straight_through=True),
    'distance_softmax_and_rows': distance_softmax,
    'class_statistics': statistics,
    'shard_map': over_devices,
    'linen': lambda x, c, _: clj.linen.CenterLoss(len(c)).apply({'centers': {'centers': c}}, x, LABELS),
    'nnx': lambda x, c, _: clj.nnx.CenterLoss(*c.shape, centers_init=lambda *_: c, rngs=nnx.Rngs(0))(x, LABELS),
}
FLAGS = {
    'dtypes': lambda: jax.numpy_dtype_promotion('strict'),
    'ranks': lambda: jax.numpy_rank_promotion('raise'),
}
# Of x, of the table, of the weights.
DTYPES = {
    'float32': (jnp.float32, jnp.float32, jnp.float32),
    'bfloat16': (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    'mixed': (jnp.float16, jnp.float32, jnp.bfloat16),
}
over_sizes = pytest.mark.parametrize('num_classes', [5, pytest.param(50, marks=pytest.mark.slow)])
with_flag = pytest.mark.parametrize('flag', FLAGS.values(), ids=FLAGS.keys())


@with_flag
@over_sizes
@pytest.mark.parametrize('dtypes', DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS.keys())
def test_a_function_can_be_traced(call, dtypes, num_classes, flag):
    shapes = (6, 4), (num_classes, 4), (6,)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with flag():
        jax.eval_shape(call, *arrays)


@over_sizes
@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS.keys())
def test_float32_stays_float32_under_x64(call, num_classes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 4), (num_classes, 4), (6,))]
    expected = jax.eval_shape(call, *arrays)
    with jax.enable_x64(True):
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(call, *arrays), expected)


@pytest.mark.parametrize('flag', some_by_default(FLAGS, 'ranks'))
@over_sizes
def test_a_step_outside_of_jit_runs(num_classes, flag):
    x, centers = jnp.ones((6, 4), jnp.bfloat16), jnp.zeros((num_classes, 4))
    with flag():
        loss, rows = clj.center_loss_and_rows(x, centers, LABELS)
        moved, _ = move(centers, rows)
    assert loss == 4
    np.testing.assert_allclose(moved[:3, 0], [1 / 4, 1 / 3, 1 / 4], rtol=1e-6)


@with_flag
def test_functions_of_the_host_run(flag):
    sharding = NamedSharding(jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,)), P('classes'))
    leaves = [np.ones((8, 3), dtype) for dtype in (np.float32, np.float16, np.int32, np.int8, bool, np.complex64)]
    with flag():
        clj.check_labels(jnp.asarray(LABELS, jnp.int8), 5)
        clj.check_replicas(leaves, stacked=True)
        clj.check_replicas({'table': jax.device_put(leaves[0], sharding), 'key': jax.random.key(0)})
        assert clj.unshard_centers(clj.shard_centers(leaves[0][:5], sharding), 5).shape == (5, 3)

"""Outside of jit no public function compiles anything from its second call with the same shapes on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support.problems import make_problem
from tests.support.programs import compilations
from tests.support.steps import update

X, CENTERS, LABELS, _ = make_problem(dtype=np.float32)
WHERE = np.arange(7) != 2
ROWS = clj.center_rows(X, CENTERS, LABELS)
MANY_CENTERS = np.concatenate([CENTERS, CENTERS + 1])


def test_the_count_sees_what_is_compiled_at_every_call():
    with compilations() as compiled:
        for k in range(3):
            jax.jit(lambda x, k=k: x + k)(X)
    assert len(compiled) == 3


TRANSFORM: Any = clj.center_update(0.5)
STATE = TRANSFORM.init(CENTERS)
WITH_CENTERS = clj.with_centers(optax.sgd(0.1))
MODEL = {'params': jnp.ones(3), 'centers': jnp.asarray(CENTERS)}
MODEL_STATE = WITH_CENTERS.init(MODEL)
NNX_CENTER = clj.nnx.CenterLoss(5, 3, rngs=nnx.Rngs(0))
LINEN_CENTER = clj.linen.CenterLoss(5)
NNX_SOFTMAX = clj.nnx.SoftmaxLoss(5, 3, rngs=nnx.Rngs(0))
LINEN_SOFTMAX = clj.linen.SoftmaxLoss(5)
STATISTICS = clj.class_statistics(X, LABELS, 5)
BY_ROWS: Any = clj.by_rows(optax.adam(0.1))
BY_ROWS_STATE = BY_ROWS.init(CENTERS)
GRADIENT = clj.RowUpdates(LABELS, X, kind='gradient')
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), ROWS, ROWS)


def by_rows():
    return NamedSharding(jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,)), P('classes'))


SHARDED = clj.shard_centers(CENTERS, by_rows())
REPLICATED = jax.device_put(CENTERS, NamedSharding(by_rows().mesh, P()))


def all_of(statistics):
    return statistics.intra, statistics.inter, statistics.ratio


CALLS = {
    'center_loss': lambda: clj.center_loss(X, CENTERS, LABELS, where=WHERE),
    'center_loss with options': lambda: clj.center_loss(X, CENTERS, LABELS, weights=X, reduce_fn=jnp.sum),
    'its gradients': lambda: jax.grad(clj.center_loss, (0, 1))(X, CENTERS, LABELS),
    'center_rows': lambda: clj.center_rows(X, CENTERS, LABELS),
    'center_loss_and_rows': lambda: clj.center_loss_and_rows(X, CENTERS, LABELS),
    'RowUpdates, C <= N': lambda: CENTERS + ROWS,
    'RowUpdates, C > N': lambda: MANY_CENTERS + ROWS,
    'RowUpdates, bfloat16': lambda: jnp.asarray(CENTERS, jnp.bfloat16) + ROWS,
    'concatenate_rows': lambda: clj.concatenate_rows(ROWS, ROWS),
    'concatenate_rows, stacked': lambda: clj.concatenate_rows(STACKED),
    'center_update, C <= N': lambda: update(TRANSFORM, ROWS, STATE, CENTERS),
    'center_update, C > N': lambda: update(TRANSFORM, ROWS, STATE, MANY_CENTERS),
    'center_update, without params': lambda: TRANSFORM.update(ROWS, STATE),
    'with_centers': lambda: update(WITH_CENTERS, {'params': jnp.ones(3), 'centers': ROWS}, MODEL_STATE, MODEL),
    'by_rows': lambda: update(BY_ROWS, GRADIENT, BY_ROWS_STATE, CENTERS),
    'class_softmax': lambda: clj.class_softmax(X, CENTERS, LABELS, where=WHERE),
    'margin_softmax, its gradients': lambda: jax.grad(clj.margin_softmax, (0, 1))(X, CENTERS, LABELS),
    'distance_softmax': lambda: clj.distance_softmax(X, CENTERS, LABELS, temperature=2.0),
    'class_softmax_and_rows': lambda: clj.class_softmax_and_rows(X, CENTERS, LABELS, classes=np.arange(5)),
    'margin_softmax_and_rows': lambda: clj.margin_softmax_and_rows(X, CENTERS, LABELS),
    'distance_softmax_and_rows': lambda: clj.distance_softmax_and_rows(X, CENTERS, LABELS, center_weight=0.1),
    'sample_classes': lambda: clj.sample_classes(jax.random.key(0), LABELS, 50, 10),
    'nearest_center': lambda: clj.nearest_center(X, CENTERS, block_size=2),
    'nearest_center, its gradient': lambda: jax.grad(lambda x: clj.nearest_center(x, CENTERS)[1].sum())(X),
    'class_statistics': lambda: all_of(clj.class_statistics(X, LABELS, 5, where=WHERE)),
    'ClassStatistics.merge': lambda: STATISTICS.merge(STATISTICS),
    'check_labels': lambda: clj.check_labels(jnp.asarray(LABELS), 5),
    'check_replicas': lambda: clj.check_replicas({'a': REPLICATED, 'b': jnp.asarray(CENTERS)}),
    'check_replicas, stacked': lambda: clj.check_replicas(np.ones((8, 3)), stacked=True),
    'shard_centers': lambda: clj.shard_centers(CENTERS, by_rows()),
    'unshard_centers': lambda: clj.unshard_centers(SHARDED),
    'linen': lambda: LINEN_CENTER.apply({'centers': {'centers': CENTERS}}, X, LABELS),
    'nnx': lambda: NNX_CENTER(X, LABELS),
    'linen.SoftmaxLoss': lambda: LINEN_SOFTMAX.apply({'classifier': {'table': CENTERS}}, X, LABELS),
    'nnx.SoftmaxLoss': lambda: NNX_SOFTMAX(X, LABELS),
}


@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS.keys())
def test_only_the_first_of_many_eager_calls_compiles(call):
    call()
    with compilations() as compiled:
        for _ in range(20):
            call()
    assert not compiled


def test_every_public_name_is_here():
    # These are types that other functions return.
    called = {word.strip(',') for name in CALLS for word in name.replace('.', ' ').split()}
    assert set(clj.__all__) - called == {'ByRowsState', 'CenterUpdateState'}


def test_check_replicas_compiles_once_for_each_shape():
    leaves = [jax.device_put(np.full((8, 5), k, np.float32), NamedSharding(by_rows().mesh, P())) for k in range(300)]
    with compilations() as compiled:
        clj.check_replicas(leaves)
    assert len(compiled) == 1

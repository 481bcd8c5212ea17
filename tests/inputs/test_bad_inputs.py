"""A table of bad inputs for every public name: outside of jit and inside, one line names the argument."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj

X, C, LABELS = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32), np.array([0, 2, 1, 0])
ROWS = clj.RowUpdates(jnp.array([1, 0]), jnp.ones((2, 2)))
GRADIENT = clj.RowUpdates(ROWS.indices, ROWS.values, kind='gradient')
CENTER_ROWS = clj.center_rows(X, C, LABELS)
NARROW, KEYS = np.ones((3, 2), jnp.float8_e4m3fn), jax.random.split(jax.random.key(0), 4)
RAGGED: Any = [[0], [1, 2], [1], [2]]
NONE: Any = None
NO_SHARDING: Any = 'classes'
CENTER: Any = 'center'
TWO: Any = [ROWS, ROWS]
MESH = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
BY_ROWS = NamedSharding(MESH, P('classes', None))


C8, C16 = np.ones((8, 2), np.float32), np.ones((16, 2), np.float32)
OVER: Any = {'class_axis': 'classes', 'mesh': MESH}
SHARDED = clj.RowUpdates(jnp.arange(8), jnp.ones((8, 2)), kind='gradient', sharding=NamedSharding(MESH, P('classes')))


def loss(x: Any = X, centers: Any = C, labels: Any = LABELS, function: Any = clj.center_loss, **options):
    return partial(lambda *arrays, **options: function(*arrays, **options), x, centers, labels, **options)


rows, both = partial(loss, function=clj.center_rows), partial(loss, function=clj.center_loss_and_rows)


def statistics(x: Any = X, labels: Any = LABELS, num_classes: Any = 3, **options):
    return partial(clj.class_statistics, x, labels, num_classes, **options)


def nearest(x: Any = X, centers: Any = C, **options):
    return partial(clj.nearest_center, x, centers, **options)


def move(updates: Any = ROWS, params: Any = C, alpha: Any = 0.5, **options):
    def call():
        transform: Any = clj.center_update(alpha, **options)
        return transform.update(updates, transform.init(params), params)

    return call


def row_step(updates: Any = GRADIENT, params: Any = C, optimizer: Any = None, given: Any = True, **options):
    def call():
        transform: Any = clj.by_rows(optax.sgd(0.1) if optimizer is None else optimizer, **options)
        return transform.update(updates, transform.init(params), params if given else None)

    return call


def model_step(optimizer: Any = None, alpha: Any = 0.5, grads: Any = None, **options):
    def call():
        transform: Any = clj.with_centers(optax.sgd(0.1) if optimizer is None else optimizer, alpha, **options)
        model = {'params': jnp.ones(2), 'centers': jnp.asarray(C)}
        return transform.update(grads or {'params': jnp.ones(2), 'centers': ROWS}, transform.init(model), model)

    return call


def softmax(function: Any, x: Any = X, table: Any = C, labels: Any = LABELS, **options):
    return partial(function, x, table, labels, **options)


def sample(labels: Any = LABELS, num_classes: Any = 9, num_sampled: Any = 5, key: Any = KEYS[0], **options):
    return lambda: clj.sample_classes(key, labels, num_classes, num_sampled, **options)


def add(indices: Any = (0, 1), values: Any = None, table: Any = C):
    values = np.ones((2, 2), np.float32) if values is None else values
    return lambda: operator.add(table, clj.RowUpdates(np.array(indices), values))


def linen(num_classes: Any = 3, x: Any = X, labels: Any = LABELS, **options):
    return lambda: clj.linen.CenterLoss(num_classes, **options).init(jax.random.key(0), x, labels)


def of_nnx(num_classes: Any = 3, num_features: Any = 2, x: Any = X, **options):
    return lambda: clj.nnx.CenterLoss(num_classes, num_features, **{'rngs': nnx.Rngs(0), **options})(x, LABELS)


def linen_softmax(num_classes: Any = 3, x: Any = X, options: Any = None, **attributes):
    module = clj.linen.SoftmaxLoss(num_classes, **attributes)
    return lambda: module.init(jax.random.key(0), x, LABELS, **(options or {}))


def nnx_softmax(num_classes: Any = 3, num_features: Any = 2, options: Any = None, **arguments):
    def call():
        module = clj.nnx.SoftmaxLoss(num_classes, num_features, **{'rngs': nnx.Rngs(0), **arguments})
        return module(X, LABELS, **(options or {}))

    return call


def check_labels(labels: Any = LABELS, num_classes: Any = 3):
    return partial(clj.check_labels, labels, num_classes)


def shard(table: Any = C, sharding: Any = BY_ROWS, **options):
    return partial(clj.shard_centers, table, sharding, **options)


def unshard(table: Any = C, num_classes: Any = None):
    return partial(clj.unshard_centers, table, num_classes)


def replicas(tree: Any, stacked=False):
    return partial(clj.check_replicas, tree, stacked=stacked)


def merged(other: Any):
    return lambda: clj.class_statistics(X, LABELS, 3).merge(other)


def traced(function: Any, *arrays):
    return lambda: jax.eval_shape(function, *arrays)


BAD: dict[str, list[tuple[Any, type[Exception], str]]] = {
    'center_loss': [
        (loss(x=None), TypeError, r'x must be.*NoneType'),
        (loss(x=RAGGED), TypeError, r'x must be.*list'),
        (loss(x={'a': X}), TypeError, r'x must be.*dict'),
        (loss(x=KEYS[:, None]), TypeError, r'x must be.*key'),
        (loss(centers=None), TypeError, r'centers must be.*NoneType'),
        (loss(centers=ROWS), TypeError, r'centers must be.*RowUpdates'),
        (loss(centers=nn.Partitioned(jnp.asarray(C), ('a', None))), TypeError, r'centers must be.*Partitioned'),
        (loss(labels=None), TypeError, r'labels must be integers.*object'),
        (loss(labels=RAGGED), TypeError, r'labels must be integers.*list'),
        (loss(labels=KEYS), TypeError, r'labels must be integers.*key'),
        (loss(labels={'a': LABELS}), TypeError, r'labels must be integers.*object'),
        (loss(labels=LABELS + 1), ValueError, r'labels\[1\] is 3'),
        (loss(where='yes'), TypeError, r'where must be boolean.*str'),
        (loss(where=RAGGED), TypeError, r'where must be boolean.*list'),
        (loss(weights='heavy'), TypeError, r'weights must be real numbers.*str'),
        (loss(weights=RAGGED), TypeError, r'weights must be real numbers.*list'),
        (loss(weights=[None] * 4), TypeError, r'weights must be real numbers.*list'),
        (loss(weights=KEYS), TypeError, r'weights must be real numbers.*key'),
        (loss(reduce_fn=0), TypeError, r'reduce_fn.*0'),
        (loss(axis_name=['a']), TypeError, r'axis_name.*\[.a.\]'),
        (loss(axis_name='btach'), NameError, r"axis_name='btach'"),
    ],
    'center_rows': [
        (rows(x='features'), TypeError, r'x must be.*str'),
        (rows(centers=C[:0]), ValueError, r'centers.*\[0, 2\]'),
        (rows(labels=LABELS[:3]), ValueError, r'labels must have shape \(4,\).*\(3,\)'),
        (rows(where=LABELS), TypeError, r'where must be boolean.*int'),
        (rows(weights=1j), ValueError, r'weights must have shape.*\(\)'),
    ],
    'center_loss_and_rows': [
        (both(x=X[:, :1]), ValueError, r'x must have shape.*D=2.*\[4, 1\]'),
        (both(centers=NARROW), TypeError, r'centers must be float16 or wider.*float8'),
        (both(labels='abc'), TypeError, r'labels must be integers.*str'),
        (both(where=True), ValueError, r'where must have shape.*\(\)'),
        (both(reduce_fn=jnp.sum, axis_name='a'), ValueError, r'axis_name goes with reduce_fn'),
    ],
    'class_statistics': [
        (statistics(x=None), TypeError, r'x must be.*NoneType'),
        (statistics(x=X[:, :0]), ValueError, r'x must have shape.*D at least 1.*\[4, 0\]'),
        (statistics(num_classes='3'), ValueError, r"num_classes must be an integer of at least 1, got '3'"),
        (statistics(num_classes=3.0), ValueError, r'num_classes must be an integer.*3\.0'),
        (statistics(num_classes=None), ValueError, r'num_classes must be an integer.*None'),
        (statistics(num_classes=2**31), ValueError, r'num_classes must be less than.*2147483648'),
        (
            traced(lambda c: clj.class_statistics(X, LABELS, c), 3),
            ValueError,
            r'num_classes must be an integer.*Tracer',
        ),
        (statistics(where=[True]), ValueError, r'where must have shape.*\(1,\)'),
        (statistics(axis_name='btach'), NameError, r"axis_name='btach'"),
    ],
    'ClassStatistics': [
        (merged(None), TypeError, r'other must be ClassStatistics.*NoneType'),
        (merged(ROWS), TypeError, r'other must be ClassStatistics.*RowUpdates'),
        (merged(clj.class_statistics(X, LABELS, 4)), ValueError, r'other must have.*\[3, 2\].*\[4, 2\]'),
    ],
    'nearest_center': [
        (nearest(x=None), TypeError, r'x must be.*NoneType'),
        (nearest(x=NARROW), TypeError, r'x must be float16 or wider.*float8'),
        (nearest(centers=C[:0]), ValueError, r'centers.*\[0, 2\]'),
        (nearest(block_size=None), ValueError, r'block_size must be an integer of at least 1, got None'),
        (nearest(block_size=0), ValueError, r'block_size must be an integer of at least 1, got 0'),
        (nearest(block_size='4'), ValueError, r"block_size must be an integer of at least 1, got '4'"),
        (traced(lambda size: nearest(block_size=size)(), 4), ValueError, r'block_size must be an integer.*Tracer'),
    ],
    'class_softmax': [
        (softmax(clj.class_softmax, x=None), TypeError, r'x must be.*NoneType'),
        (softmax(clj.class_softmax, x=X[:, :1]), ValueError, r'x must have shape.*D=2.*\[4, 1\]'),
        (softmax(clj.class_softmax, table=C[0]), ValueError, r'table must have shape.*\[2\]'),
        (softmax(clj.class_softmax, table=ROWS), TypeError, r'table must be.*RowUpdates'),
        (softmax(clj.class_softmax, labels=LABELS + 1), ValueError, r'labels\[1\] is 3'),
        (softmax(clj.class_softmax, labels=X), TypeError, r'labels must be integers.*one-hot'),
        (softmax(clj.class_softmax, where=LABELS), TypeError, r'where must be boolean.*int'),
        (softmax(clj.class_softmax, block_size=0), ValueError, r'block_size must be an integer of at least 1, got 0'),
        (softmax(clj.class_softmax, block_size=None), ValueError, r'block_size must be an integer.*None'),
    ],
    'class_softmax over devices': [
        (softmax(clj.class_softmax, mesh=MESH), ValueError, r'mesh goes with class_axis'),
        (softmax(clj.class_softmax, mesh='m', class_axis='a'), TypeError, r"mesh must be a jax.sharding.Mesh.*'m'"),
        (softmax(clj.class_softmax, class_axis='a', mesh=MESH), ValueError, r"class_axis=\('a',\) is not in the mesh"),
        (softmax(clj.class_softmax, class_axis='a'), ValueError, r"class_axis=\('a',\) is not in the mesh.*set_mesh"),
        (softmax(clj.class_softmax, class_axis=0), TypeError, r'class_axis must be the name of an axis.*got 0'),
        (
            softmax(clj.class_softmax, class_axis='classes', mesh=MESH),
            ValueError,
            r'table must have.*8 shards divide, got 3: shard_centers pads it',
        ),
        (softmax(clj.class_softmax, axis_name=0), TypeError, r'axis_name must be the name of an axis.*0'),
        (
            softmax(clj.class_softmax, axis_name='classes', class_axis='classes', mesh=MESH),
            NameError,
            r"axis_name='classes' is not the name of an axis here",
        ),
        (softmax(clj.class_softmax, num_classes=4), ValueError, r'num_classes must be at most 3.*got 4'),
        (softmax(clj.class_softmax, num_classes=0), ValueError, r'num_classes must be an integer.*0'),
        (softmax(clj.class_softmax, num_classes=2), ValueError, r'labels\[1\] is 2, but there are 2 classes'),
    ],
    'class_softmax_and_rows over devices': [
        (
            softmax(clj.class_softmax_and_rows, table=C8, classes=[0, 1, 2], class_axis='classes', mesh=MESH),
            ValueError,
            r'classes must have equally many for each of the 8 shards',
        ),
        (
            softmax(clj.class_softmax_and_rows, table=C16, classes=range(8), class_axis='classes', mesh=MESH),
            ValueError,
            r'classes must have equally many.*sample_classes with class_axis=',
        ),
    ],
    'class_softmax_and_rows': [
        (softmax(clj.class_softmax_and_rows, weight='1'), TypeError, r"weight must be a number, got '1'"),
        (softmax(clj.class_softmax_and_rows, weight=X[:, 0]), TypeError, r'weight must be a number'),
        (softmax(clj.class_softmax_and_rows, classes='012'), TypeError, r'classes must be integers.*str'),
        (
            softmax(clj.class_softmax_and_rows, classes=[0.0, 2.0]),
            TypeError,
            r'classes must be integers.*float64.*classes\.astype',
        ),
        (softmax(clj.class_softmax_and_rows, classes=2), ValueError, r'classes must have shape \[S\].*\[\]'),
        (softmax(clj.class_softmax_and_rows, classes=[]), ValueError, r'classes must have shape \[S\].*\[0\]'),
        (softmax(clj.class_softmax_and_rows, classes=[2, 0, 1]), ValueError, r'classes must be distinct, in ascending'),
        (softmax(clj.class_softmax_and_rows, classes=[0, 1, 1, 2]), ValueError, r'classes must be distinct'),
        (softmax(clj.class_softmax_and_rows, classes=[0, 1, 2, 3]), ValueError, r'classes must be.*from 0 to 2'),
        (softmax(clj.class_softmax_and_rows, classes=[-1, 0, 1, 2]), ValueError, r'classes must be.*from 0 to 2'),
    ],
    'margin_softmax': [
        (softmax(clj.margin_softmax, scale=0.0), ValueError, r'scale must be positive, got 0\.0'),
        (softmax(clj.margin_softmax, scale=None), TypeError, r'scale must be a number, got None'),
        (softmax(clj.margin_softmax, angular_margin=4.0), ValueError, r'angular_margin must be from 0 to pi, got 4\.0'),
        (softmax(clj.margin_softmax, angular_margin=-0.1), ValueError, r'angular_margin must be.*-0\.1'),
        (
            softmax(clj.margin_softmax, additive_margin='0.4'),
            TypeError,
            r"additive_margin must be a number, got '0\.4'",
        ),
    ],
    'margin_softmax_and_rows': [
        (softmax(clj.margin_softmax_and_rows, scale=-1), ValueError, r'scale must be positive, got -1'),
        (softmax(clj.margin_softmax_and_rows, angular_margin=1j), TypeError, r'angular_margin must be a number'),
        (softmax(clj.margin_softmax_and_rows, weight=None), TypeError, r'weight must be a number, got None'),
    ],
    'distance_softmax': [
        (softmax(clj.distance_softmax, temperature=0), ValueError, r'temperature must be positive, got 0'),
        (softmax(clj.distance_softmax, temperature=float('nan')), ValueError, r'temperature must be positive, got nan'),
        (softmax(clj.distance_softmax, margin=None), TypeError, r'margin must be a number, got None'),
    ],
    'distance_softmax_and_rows': [
        (softmax(clj.distance_softmax_and_rows, center_weight=None), TypeError, r'center_weight must be a number'),
        (softmax(clj.distance_softmax_and_rows, temperature='1'), TypeError, r'temperature must be a number'),
    ],
    'sample_classes': [
        (sample(labels=None), TypeError, r'labels must be integers.*object'),
        (sample(labels=LABELS + 7), ValueError, r'labels\[1\] is 9'),
        (sample(num_classes=0), ValueError, r'num_classes must be an integer.*0'),
        (sample(num_sampled=5.0), ValueError, r'num_sampled must be an integer.*5\.0'),
        (sample(num_sampled=3), ValueError, r'num_sampled must be from 4 to 9, got 3'),
        (sample(num_sampled=10), ValueError, r'num_sampled must be from 4 to 9, got 10'),
        (sample(key=None), TypeError, r'key must be a key of jax.random.*NoneType'),
        (sample(key=KEYS), TypeError, r'key must be a key of jax.random.*\[4\]'),
    ],
    'sample_classes over devices': [
        (
            sample(num_classes=80, num_sampled=20, **OVER),
            ValueError,
            r'num_sampled.*from 32 to 80, a multiple of 8.*20',
        ),
        (sample(num_classes=80, num_sampled=24, **OVER), ValueError, r'num_sampled.*from 32 to 80.*on each device'),
        (sample(class_axis='a', mesh=MESH), ValueError, r"class_axis=\('a',\) is not in the mesh"),
        (sample(mesh=MESH), ValueError, r'mesh goes with class_axis'),
        (sample(axis_name='a'), NameError, r"axis_name='a'"),
    ],
    'center_update': [
        (move(alpha=None), TypeError, r'alpha must be a number.*None'),
        (move(alpha=1j), TypeError, r'alpha must be a number.*1j'),
        (move(alpha=np.array(1j)), TypeError, r'alpha must be a number.*1\.j'),
        (move(alpha={}), TypeError, r'alpha must be a number.*\{\}'),
        (move(alpha=1.5), ValueError, r'alpha must be in \[0, 1\].*1\.5'),
        (move(alpha=lambda count: None), TypeError, r'alpha must be a schedule that returns a number.*None'),
        (move(alpha=lambda count: jnp.ones(2)), TypeError, r'alpha must be a schedule that returns a number'),
        (move(mesh='data'), TypeError, r"mesh must be a jax.sharding.Mesh.*'data'"),
        (move(axis_name=0), TypeError, r'axis_name.*0'),
        (move(updates=C), TypeError, r'center_update takes RowUpdates.*float32\[3,2\]'),
        (move(updates=GRADIENT), TypeError, r"center_update.*kind 'gradient'.*by_rows"),
        (move(params=C[0]), ValueError, r'table of the rows must have shape \[C, D\].*\[2\]'),
        (move(params=np.float32(1)), ValueError, r'table of the rows must have shape \[C, D\].*\[\]'),
        (move(params=np.ones((3, 5), np.float32)), ValueError, r'rows of 2 features.*table \[3, 5\]'),
    ],
    'by_rows': [
        (row_step(optimizer=0.1), TypeError, r'optimizer must be an optax optimizer.*0\.1'),
        (row_step(optimizer=optax.adam), TypeError, r'optimizer must be an optax optimizer.*function'),
        (row_step(optimizer=optax.lamb(0.1)), ValueError, r'by_rows.*each row by itself'),
        (row_step(optimizer=optax.MultiSteps(optax.sgd(0.1), 2)), TypeError, r'by_rows accumulates'),
        (row_step(mesh='data'), TypeError, r"mesh must be a jax.sharding.Mesh.*'data'"),
        (row_step(axis_name='btach'), NameError, r"axis_name='btach'"),
        (row_step(params=C.astype(int)), TypeError, r'a table of by_rows must be floating point.*int'),
        (row_step(params=C[0]), ValueError, r'a table of by_rows must have shape \[C, D\].*\[2\]'),
        (row_step(params=C, given=False), ValueError, r'by_rows takes the tables too'),
        (row_step(params=np.ones((3, 5), np.float32)), ValueError, r'rows of 2 features.*table \[3, 5\]'),
        (row_step(updates=C), TypeError, r'by_rows takes RowUpdates.*float32\[3,2\]'),
        (row_step(updates={}, params={}), TypeError, r'by_rows takes RowUpdates.*nothing'),
        (row_step(updates=CENTER_ROWS), TypeError, r"by_rows.*kind 'centers'.*center_update"),
        (row_step(updates={'a': GRADIENT}, params={'b': C}), ValueError, r"'b'"),
    ],
    'by_rows over devices': [
        (row_step(class_axis='a'), ValueError, r"class_axis='a' is no axis.*pass the rows of a softmax"),
        (row_step(class_axis=0), TypeError, r'class_axis must be the name of an axis.*got 0'),
        (
            row_step(updates=SHARDED, params=C16, class_axis='a'),
            ValueError,
            r"class_axis is 'a', but the rows lie over",
        ),
        (row_step(updates=SHARDED), ValueError, r'the rows lie over 8 shards.*table, 3'),
    ],
    'with_centers': [
        (model_step(classifier=0.1), TypeError, r'classifier must be an optax optimizer.*0\.1'),
        (model_step(classifier=clj.by_rows(optax.sgd(0.1))), ValueError, r'no centers and no classifier'),
        (model_step(optimizer=0.1), TypeError, r'optimizer must be an optax optimizer.*0\.1'),
        (model_step(optimizer=optax.adam), TypeError, r'optimizer must be an optax optimizer.*function'),
        (model_step(alpha=None), TypeError, r'alpha must be a number.*None'),
        (model_step(mesh=BY_ROWS), TypeError, r'mesh must be a jax.sharding.Mesh.*NamedSharding'),
        (model_step(axis_name='btach'), NameError, r"axis_name='btach'"),
        (model_step(grads={'params': jnp.ones(2), 'centers': C}), TypeError, r'takes RowUpdates'),
    ],
    'RowUpdates': [
        (add(indices=[0.0, 1.0]), TypeError, r'RowUpdates.*indices are float64'),
        (add(indices=[True, False]), TypeError, r'RowUpdates.*indices are bool'),
        (add(indices=1), ValueError, r'RowUpdates must have indices \[N\]'),
        (lambda: C + clj.RowUpdates(NONE, X[:2]), TypeError, r'indices of RowUpdates must be integers.*NoneType'),
        (add(values='b'), TypeError, r'values of RowUpdates must be.*str'),
        (add(values=np.ones((2, 2), np.complex64)), TypeError, r'values of RowUpdates.*complex64'),
        (add(values=NARROW[:2]), TypeError, r'values of RowUpdates must be float16 or wider.*float8'),
        (add(values=np.ones((2, 3), np.float32)), ValueError, r'rows of 3 features.*table \[3, 2\]'),
        (add(table=np.ones((3, 2), np.int32)), TypeError, r'table must be floating point.*int32'),
        (add(table=C[0]), ValueError, r'table must have shape.*\[2\]'),
        (partial(clj.RowUpdates, LABELS, X, kind=TWO), ValueError, r"kind must be 'centers'"),
        (partial(clj.RowUpdates, LABELS, X, kind=CENTER), ValueError, r"kind must be.*got 'center'"),
    ],
    'RowUpdates over devices': [
        (lambda: C + SHARDED, ValueError, r'the rows lie over 8 shards of their table.*table, 3'),
        (partial(clj.RowUpdates, LABELS, X, sharding=NO_SHARDING), TypeError, r'sharding must be a NamedSharding.*str'),
        (partial(clj.concatenate_rows, SHARDED, GRADIENT), ValueError, r'got two layouts'),
    ],
    'concatenate_rows': [
        (clj.concatenate_rows, ValueError, r'concatenate_rows needs at least one'),
        (partial(clj.concatenate_rows, TWO), TypeError, r'expected RowUpdates.*list'),
        (partial(clj.concatenate_rows, NONE), TypeError, r'expected RowUpdates.*NoneType'),
        (partial(clj.concatenate_rows, ROWS, clj.RowUpdates(jnp.array([1]), X[:1, :1])), ValueError, r'\[1, 2\] feat'),
    ],
    'check_labels': [
        (check_labels(None), TypeError, r'labels must be integers.*object'),
        (check_labels(RAGGED), TypeError, r'labels must be integers.*list'),
        (check_labels([0.5]), TypeError, r'labels must be integers.*float64'),
        (check_labels([1, 3]), ValueError, r'labels\[1\] is 3'),
        (check_labels(num_classes=None), ValueError, r'num_classes must be an integer.*None'),
        (check_labels(num_classes=float('nan')), ValueError, r'num_classes must be an integer.*nan'),
        (check_labels(num_classes=np.array([3, 3])), ValueError, r'num_classes must be an integer.*\[3, 3\]'),
        (
            traced(lambda labels: clj.check_labels(labels, 3), LABELS),
            TypeError,
            r'values of labels.*outside of jax.jit',
        ),
    ],
    'shard_centers': [
        (shard(None), TypeError, r'table must be an array of numbers.*object'),
        (shard('abc'), TypeError, r'table must be an array of numbers.*str'),
        (shard(KEYS, fill=0), TypeError, r'table must be an array of numbers.*Key'),
        (shard(RAGGED), TypeError, r'table must be.*list'),
        (shard([[1, 2]]), TypeError, r'table must be floating point.*int64\[1,2\].*fill=0'),
        (shard(NARROW), TypeError, r'table must be float16 or wider.*float8'),
        (shard(C[0]), ValueError, r'table must have shape \[C, D\].*\[2\].*fill=0'),
        (shard(C[:0]), ValueError, r'table must have shape \[C, \.\.\.\].*\[0, 2\]'),
        (shard(np.float32(1), fill=0), ValueError, r'table must have shape \[C, \.\.\.\].*\[\]'),
        (shard(fill=1.0), ValueError, r'fill must be numpy.inf for centers, or 0.*1\.0'),
        (shard(fill=None), ValueError, r'fill must be.*None'),
        (shard(fill=np.zeros(2)), ValueError, r'fill must be.*array'),
        (shard(sharding=None), TypeError, r'sharding must be a NamedSharding.*NoneType'),
        (shard(sharding=P('classes')), TypeError, r'sharding must be a NamedSharding.*P'),
        (shard(sharding=MESH), TypeError, r'sharding must be a NamedSharding.*Mesh'),
        (shard(C[0], NamedSharding(MESH, P(None, 'classes')), fill=0), ValueError, r'sharding is.*more axes.*\[2\]'),
        (traced(lambda c: shard(c)(), C), TypeError, r'values of table.*outside of jax.jit'),
    ],
    'unshard_centers': [
        (unshard(None), TypeError, r'table must be an array of numbers.*object'),
        (unshard(RAGGED), TypeError, r'table must be an array of numbers.*list'),
        (unshard(C[:0]), ValueError, r'table must have shape.*\[0, 2\]'),
        (unshard(np.float32(1)), ValueError, r'table must have shape.*\[\]'),
        (unshard(num_classes='3'), ValueError, r"num_classes must be an integer of at least 1, got '3'"),
        (unshard(num_classes=0), ValueError, r'num_classes must be an integer of at least 1, got 0'),
        (unshard(num_classes=4), ValueError, r'num_classes is 4, but the table has rows of 3 classes'),
        (traced(lambda c: unshard(c)(), C), TypeError, r'values of table.*outside of jax.jit'),
    ],
    'check_replicas': [
        (replicas({'a': 'text'}), TypeError, r"\['a'\] must be numbers.*str"),
        (replicas({'a': object()}), TypeError, r"\['a'\] must be numbers.*object"),
        (replicas({'a': 1.0}, stacked=True), ValueError, r"axis of devices.*\['a'\].*\[\]"),
        (replicas(X[:0], stacked=True), ValueError, r'axis of devices.*tree.*\[0, 2\]'),
        (traced(lambda a: replicas(a)(), X), TypeError, r'values of tree.*outside of jax.jit'),
    ],
    'linen.CenterLoss': [
        (linen(0), ValueError, r'num_classes must be an integer of at least 1, got 0'),
        (linen(None), ValueError, r'num_classes must be an integer.*None'),
        (linen(2.5), ValueError, r'num_classes must be an integer.*2\.5'),
        (linen(x=np.float32(1), labels=0), ValueError, r'x must have shape.*\[\]'),
        (linen(x=None), TypeError, r'x must be.*NoneType'),
        (linen(labels=LABELS + 1), ValueError, r'labels\[1\] is 3'),
        (linen(dtype=jnp.int32), TypeError, r'dtype must be floating point, got.*int32'),
        (linen(centers_init=lambda *_: C.astype(int)), TypeError, r'array of centers_init must be floating point.*int'),
        (linen(centers_init=C), TypeError, r'centers_init must be an initializer'),
        (linen(centers_init=lambda *_: None), ValueError, r'centers_init must return an array \[3, 2\], got \[\]'),
        (linen(centers_init=lambda *_: jnp.ones((2, 3))), ValueError, r'centers_init.*\[3, 2\], got \[2, 3\]'),
    ],
    'nnx.CenterLoss': [
        (of_nnx('3'), ValueError, r"num_classes must be an integer.*'3'"),
        (of_nnx(num_features=0), ValueError, r'num_features must be an integer of at least 1, got 0'),
        (of_nnx(num_features=None), ValueError, r'num_features must be an integer.*None'),
        (of_nnx(rngs=0), TypeError, r'rngs must be nnx.Rngs.*0'),
        (of_nnx(dtype=jnp.float8_e5m2), TypeError, r'array of centers_init must be float16 or wider.*float8'),
        (of_nnx(centers_init=None), TypeError, r'centers_init must be an initializer.*None'),
        (of_nnx(centers_init=lambda *_: jnp.ones(3)), ValueError, r'centers_init.*\[3, 2\], got \[3\]'),
        (of_nnx(x=np.ones((4, 5), np.float32)), ValueError, r'x must have shape.*D=2.*\[4, 5\]'),
    ],
    'linen.SoftmaxLoss': [
        (linen_softmax(0), ValueError, r'num_classes must be an integer of at least 1, got 0'),
        (linen_softmax(x=None), TypeError, r'x must be.*NoneType'),
        (linen_softmax(loss_fn=None), TypeError, r'loss_fn must be a loss that returns \(loss, rows\).*None'),
        (linen_softmax(loss_fn=clj.margin_softmax), TypeError, r'loss_fn must be.*but it has returned'),
        (linen_softmax(options={'classes': [2, 0, 1]}), ValueError, r'classes must be distinct'),
        (linen_softmax(options={'scale': 0}), ValueError, r'scale must be positive, got 0'),
        (linen_softmax(options={'margin': 0}), TypeError, r"unexpected keyword argument 'margin'"),
        (linen_softmax(dtype=jnp.int32), TypeError, r'dtype must be floating point, got.*int32'),
        (linen_softmax(table_init=C), TypeError, r'table_init must be an initializer'),
        (linen_softmax(table_init=lambda *_: jnp.ones(3)), ValueError, r'table_init.*\[3, 2\], got \[3\]'),
    ],
    'nnx.SoftmaxLoss': [
        (nnx_softmax('3'), ValueError, r"num_classes must be an integer.*'3'"),
        (nnx_softmax(num_features=None), ValueError, r'num_features must be an integer.*None'),
        (nnx_softmax(num_features=5), ValueError, r'x must have shape.*D=5.*\[4, 2\]'),
        (nnx_softmax(rngs=0), TypeError, r'rngs must be nnx.Rngs.*0'),
        (nnx_softmax(loss_fn=X), TypeError, r'loss_fn must be a loss that returns'),
        (nnx_softmax(loss_fn=lambda *_: (0.0, 0.0)), TypeError, r'loss_fn must be.*but it has returned tuple'),
        (nnx_softmax(options={'weight': '1'}), TypeError, r"weight must be a number, got '1'"),
        (nnx_softmax(table_init=None), TypeError, r'table_init must be an initializer.*None'),
    ],
    'nnx.Table': [
        (row_step(params=clj.nnx.Table(jnp.ones(2))), ValueError, r'table of by_rows must have shape.*\[2\]'),
    ],
    'nnx.Centers': [
        (loss(centers=clj.nnx.Centers(jnp.ones(2))), ValueError, r'centers must have shape.*\[2\]'),
        (loss(centers=clj.nnx.Centers(jnp.ones((3, 2), int))), TypeError, r'centers must be floating point.*int'),
    ],
}
CASES = [
    pytest.param(call, error, message, id=f'{name} {n}')
    for name, cases in BAD.items()
    for n, (call, error, message) in enumerate(cases)
]


def test_every_public_name_is_in_the_table():
    functions = {
        'linen': {'linen.CenterLoss', 'linen.SoftmaxLoss'},
        'nnx': {'nnx.CenterLoss', 'nnx.Centers', 'nnx.SoftmaxLoss', 'nnx.Table'},
    }
    names = set[str]().union(*(functions.get(name, {name}) for name in clj.__all__))
    in_table = {name.removesuffix(' over devices') for name in BAD}
    assert in_table == names - {'CenterUpdateState', 'ByRowsState'}  # NamedTuples, which take anything


@pytest.mark.parametrize(('call', 'error', 'message'), CASES)
@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_a_bad_input_is_an_error_that_names_the_argument(call, error, message, jit):
    with pytest.raises(error, match=message) as excinfo:
        jax.eval_shape(lambda _: call(), 0.0) if jit else call()
    assert 'Traceback' not in str(excinfo.value)
    assert len(str(excinfo.value)) < 600

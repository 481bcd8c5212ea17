"""nnx.CenterLoss and nnx.SoftmaxLoss: the modules, and steps with nnx.Optimizer in graph mode and in tree mode."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import centerloss_jax as clj
from tests.support import oracle
from tests.support.cases import some_by_default
from tests.support.steps import (
    SGD,
    NnxModel,
    center_state,
    jit_nnx_step,
    make_batch,
    nnx_arrays,
    nnx_pair,
    nnx_step,
    nnx_table,
    softmax_loss,
)

both_modes = pytest.mark.parametrize('graph', [True, False], ids=['graph', 'tree'])
both_models = pytest.mark.parametrize('batch_norm', [False, True], ids=['plain', 'BatchNorm'])


class TestModule:
    x, labels = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32), np.array([0, 2, 1, 0])

    def test_returns_center_loss_and_rows_of_its_table(self, worked_example):
        center = clj.nnx.CenterLoss(
            3, 2, centers_init=lambda key, shape, dtype: jnp.asarray(worked_example.centers), rngs=nnx.Rngs(0)
        )
        loss, rows = center(self.x, self.labels)
        assert loss == 4.75
        _, expected = clj.center_loss_and_rows(self.x, worked_example.centers, self.labels)
        chex.assert_trees_all_equal(rows, expected)

    def test_passes_every_option_on(self):
        center, labels = clj.nnx.CenterLoss(3, 2, rngs=nnx.Rngs(0)), np.array([0, 2, 1, -1])
        options = {
            'where': np.array([True, False, True, True]),
            'weights': np.arange(4.0),
            'reduce_fn': jnp.sum,
        }
        expected = clj.center_loss_and_rows(self.x, np.zeros((3, 2), np.float32), labels, **options)
        chex.assert_trees_all_equal(center(self.x, labels, **options), expected)
        with pytest.raises(NameError, match=r"axis_name='btach'"):
            center(self.x, labels, axis_name='btach')

    def test_centers_are_variables_of_their_own_type(self):
        # If a filter for nnx.Param found the table, Adam would keep two more of its size.
        center = clj.nnx.CenterLoss(3, 2, rngs=nnx.Rngs(0))
        assert not jax.tree.leaves(nnx.state(center, nnx.Param))
        assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(center, clj.nnx.Centers))] == [(3, 2)]

    @pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_initializer_and_dtype(self, dtype):
        make = partial(clj.nnx.CenterLoss, 500, 2, centers_init=nnx.initializers.normal(2.0), dtype=dtype)
        center, other = make(rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(1))
        chex.assert_shape(center.centers[...], (500, 2))
        chex.assert_type(center.centers[...], dtype)
        np.testing.assert_allclose(jnp.std(center.centers[...].astype(jnp.float32)), 2.0, rtol=0.1)
        assert jnp.any(center.centers[...] != other.centers[...])
        loss, _ = center(self.x.astype(jnp.bfloat16), self.labels)
        chex.assert_type(loss, jnp.float32)

    @pytest.mark.parametrize(('num_classes', 'num_features'), [(0, 2), (3, -1)])
    def test_needs_at_least_one_class_and_one_feature(self, num_classes, num_features):
        with pytest.raises(ValueError, match=r'num_(classes|features) must be .* at least 1, got (0|-1)'):
            clj.nnx.CenterLoss(num_classes, num_features, rngs=nnx.Rngs(0))

    def test_one_class_and_one_feature_suffice(self):
        assert clj.nnx.CenterLoss(1, 1, rngs=nnx.Rngs(0)).centers.shape == (1, 1)

    def test_an_initializer_of_another_shape_is_named(self):
        with pytest.raises(ValueError, match=r'centers_init.*\[3, 2\].*\[2, 3\]'):
            clj.nnx.CenterLoss(3, 2, centers_init=lambda *_: jnp.zeros((2, 3)), rngs=nnx.Rngs(0))

    def test_centers_start_at_zero_in_float32(self):
        centers = clj.nnx.CenterLoss(7, 2, rngs=nnx.Rngs(0)).centers[...]
        np.testing.assert_array_equal(centers, np.zeros((7, 2)))
        chex.assert_type(centers, jnp.float32)

    def test_the_table_may_start_from_class_means(self):
        labels = np.array([0, 0, 0, 1, 1, 2])
        x = np.random.default_rng(0).normal(5, 2, (6, 16)).astype(np.float32)
        statistics = clj.class_statistics(x, labels, 3)
        center = clj.nnx.CenterLoss(
            3, 16, centers_init=lambda key, shape, dtype: statistics.mean.astype(dtype), rngs=nnx.Rngs(0)
        )
        replaced = clj.nnx.CenterLoss(3, 16, rngs=nnx.Rngs(0))
        replaced.centers[...] = statistics.mean
        for started in (center, replaced):
            loss, _ = started(x, labels)
            np.testing.assert_allclose(loss, oracle.class_statistics(x, labels, 3).intra * (6 - 3) / 6, rtol=1e-5)


@both_modes
class TestStep:
    @both_models
    def test_centers_move_by_eq_4_from_the_centers_of_the_loss(self, graph, batch_norm):
        images, labels = make_batch(left_out=[3])
        model, optimizer = nnx_pair(alpha=0.5, graph=graph, batch_norm=batch_norm)
        model.center.centers[...] = jax.random.normal(jax.random.key(7), (5, 3))
        before = nnx_table(model)
        rows: Any = model(images, labels)[2]
        features = before[np.maximum(labels, 0)] - rows.values
        jit_nnx_step(graph=graph)(model, optimizer, images, labels)
        expected = oracle.center_update(features, before, labels, 0.5)
        np.testing.assert_allclose(nnx_table(model), expected, rtol=1e-5, atol=1e-5)
        state = center_state(nnx.as_pure(optimizer.opt_state))
        np.testing.assert_allclose(state.step_norm, np.linalg.norm(nnx_table(model) - before), rtol=1e-5)

    @both_models
    def test_evaluation_changes_nothing_and_training_changes_every_variable(self, graph, batch_norm):
        batch = make_batch()
        model, optimizer = nnx_pair(graph=graph, batch_norm=batch_norm)
        step, losses = jit_nnx_step(graph=graph), []
        for _ in range(30):
            before = nnx_arrays(model)
            model.eval()
            model(batch.images)
            chex.assert_trees_all_equal(nnx_arrays(model), before)
            model.train()
            losses.append(float(step(model, optimizer, *batch)))
            for old, new in zip(*map(jax.tree.leaves, (before, nnx_arrays(model))), strict=True):
                assert np.any(old != new)
        assert isinstance(model.center.centers, clj.nnx.Centers)
        assert losses[-1] < 0.7 * losses[0]

    def test_one_trace_serves_every_step_and_a_short_last_batch(self, graph):
        model, optimizer = nnx_pair(graph=graph, batch_norm=True)

        @partial(nnx.jit, donate_argnames=('model', 'optimizer'), graph=graph)
        @partial(chex.assert_max_traces, n=1)
        def traced(model, optimizer, images, labels):
            return nnx_step(model, optimizer, images, labels, graph=graph)

        step: Any = traced
        for seed, left_out in enumerate([(), (), (5, 6, 7), range(8)]):
            before, (images, labels) = nnx_table(model), make_batch(seed, left_out=left_out)
            assert np.isfinite(step(model, optimizer, images, labels))
            absent = ~np.isin(np.arange(5), labels)
            np.testing.assert_array_equal(nnx_table(model)[absent], before[absent])
        state = center_state(nnx.as_pure(optimizer.opt_state))
        assert (state.count, state.dropped) == (4, 0)
        chex.clear_trace_counter()

    def test_centers_do_not_depend_on_the_weight_of_the_loss(self, graph):
        models = []
        for weight in (1e-4, 10.0):
            model, optimizer = nnx_pair(graph=graph)
            jit_nnx_step(graph=graph)(model, optimizer, *make_batch(), weight)
            models.append(model)
        weak, strong = models
        np.testing.assert_array_equal(nnx_table(weak), nnx_table(strong))
        assert np.any(nnx_table(weak) != 0)
        assert np.any(np.not_equal(weak.inner.kernel[...], strong.inner.kernel[...]))

    def test_no_optimizer_state_grows_with_the_number_of_classes(self, graph):
        shapes = [
            [leaf.shape for leaf in jax.tree.leaves(nnx_pair(graph=graph, num_classes=n)[1].opt_state)]
            for n in (1000, 1001)
        ]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize('wrt', [nnx.Param, (nnx.Param, nnx.BatchStat)], ids=['Param', 'all but Centers'])
    def test_an_optimizer_whose_wrt_does_not_name_centers_is_an_error(self, graph, wrt):
        # nnx.Optimizer drops gradients that wrt does not name, and the centers would never move.
        model = NnxModel(batch_norm=True, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r'wrt=\(nnx.Param, centerloss_jax.nnx.Centers\)'):
            nnx.Optimizer(model, clj.with_centers(optax.adam(1e-3)), wrt=wrt, graph=graph)


def gradients(model, batch, graph):
    def loss_fn(model):
        logits, center, rows = model(*batch)
        return softmax_loss(logits, batch.labels) + center, rows

    (_, rows), grads = nnx.value_and_grad(loss_fn, has_aux=True, graph=graph)(model)
    return grads, rows


def as_a_state_of_params(grads, rows):
    # In tree mode the gradients hold centers and batch statistics too, and this leaves them out.
    grads = nnx.state(grads, nnx.Param)
    grads['center'] = {'centers': clj.nnx.Centers(rows)}
    return grads


def as_an_attribute(grads, rows):
    grads.center = {'centers': clj.nnx.Centers(rows)}
    return grads


def as_an_item(grads, rows):
    grads['center'] = {'centers': clj.nnx.Centers(rows)}
    return grads


PLACED = {
    'attribute, graph': (as_an_attribute, True),
    'attribute, tree': (as_an_attribute, False),
    'state of params, graph': (as_a_state_of_params, True),
    'state of params, tree': (as_a_state_of_params, False),
    'item, graph': (as_an_item, True),
}


@pytest.mark.parametrize(('place', 'graph'), some_by_default(PLACED, 'attribute, tree', 'item, graph'))
def test_rows_may_be_placed_beside_the_gradients(place, graph):
    batch, (model, optimizer) = make_batch(), nnx_pair(SGD, graph=graph, batch_norm=True)
    expected, reference = nnx_pair(SGD, graph=graph, batch_norm=True)
    jit_nnx_step(graph=graph)(expected, reference, *batch)
    optimizer.update(model, place(*gradients(model, batch, graph)))
    chex.assert_trees_all_close(nnx_arrays(model), nnx_arrays(expected), rtol=1e-5, atol=1e-6)
    assert np.any(nnx_table(model) != 0)


def _set(value):
    def place(grads, rows):
        grads.center = {} if value is None else {'centers': value(rows)}

    return place


LOST = {
    'forgotten': lambda grads, rows: None,
    'not wrapped': _set(lambda rows: rows),
    'wrapped in a type that wrt leaves out': _set(nnx.Variable),
    'an empty entry': _set(None),
}


@both_modes
@pytest.mark.parametrize('place', LOST.values(), ids=LOST.keys())
def test_rows_that_the_optimizer_would_lose_are_an_error(place, graph):
    model, optimizer = nnx_pair(graph=graph)
    before = nnx_arrays(model)
    grads, rows = gradients(model, make_batch(), graph)
    place(grads, rows)
    with pytest.raises(ValueError, match=r'no centers.*wrt.*centerloss_jax.nnx.Centers\(rows\)'):
        optimizer.update(model, grads)
    chex.assert_trees_all_equal(nnx_arrays(model), before)


class TwoTables(NnxModel):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.other = clj.nnx.CenterLoss(4, 6, rngs=rngs)


# In tree mode the gradients hold an entry for the forgotten table too, and an optimizer without a state, such as sgd,
# would take it for a parameter. A state of params does not have it.
@pytest.mark.parametrize(
    ('optimizer', 'place', 'graph'),
    [
        pytest.param(optax.adam(1e-2), as_an_attribute, True, id='adam, attribute, graph'),
        pytest.param(optax.adam(1e-2), as_an_attribute, False, id='adam, attribute, tree'),
        pytest.param(optax.sgd(0.1), as_an_attribute, True, id='sgd, attribute, graph'),
        pytest.param(optax.sgd(0.1), as_a_state_of_params, True, id='sgd, state of params, graph'),
        pytest.param(optax.sgd(0.1), as_a_state_of_params, False, id='sgd, state of params, tree'),
    ],
)
def test_rows_for_one_of_two_tables_are_an_error(optimizer, place, graph):
    model = TwoTables(rngs=nnx.Rngs(0))
    transform = clj.with_centers(optimizer)
    optimizer = nnx.Optimizer(model, transform, wrt=(nnx.Param, clj.nnx.Centers), graph=graph)
    before = nnx_arrays(model)
    grads = place(*gradients(model, make_batch(), graph))
    with pytest.raises((ValueError, TypeError)):
        optimizer.update(model, grads)
    chex.assert_trees_all_equal(nnx_arrays(model), before)


def test_a_linen_module_inside_nnx_has_its_table_in_centers():
    x, labels = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 3
    model: Any = bridge.ToNNX(clj.linen.CenterLoss(5), rngs=nnx.Rngs(0)).lazy_init(x, labels)
    assert isinstance(model.centers, clj.nnx.Centers)
    optimizer = nnx.Optimizer(model, clj.with_centers(optax.sgd(0.1)), wrt=(nnx.Param, clj.nnx.Centers))

    @nnx.jit
    def step(model, optimizer):
        _, rows = model(x, labels)
        optimizer.update(model, nnx.State({'centers': clj.nnx.Centers(rows)}))

    step(model, optimizer)
    expected = oracle.center_update(x, np.zeros((5, 3)), labels, 0.5)
    np.testing.assert_allclose(model.centers[...], expected, rtol=1e-5)


class TestSoftmaxLoss:
    x, labels = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32), np.array([0, 2, 1, -1])

    def test_returns_the_loss_and_rows_of_its_table_with_every_option(self):
        softmax = clj.nnx.SoftmaxLoss(7, 2, rngs=nnx.Rngs(0))
        options = {'where': np.array([True, False, True, True]), 'classes': np.arange(5), 'weight': 0.5, 'scale': 8.0}
        expected = clj.margin_softmax_and_rows(self.x, softmax.table[...], self.labels, **options)
        chex.assert_trees_all_equal(softmax(self.x, self.labels, **options), expected)

    def test_another_loss_is_taken(self):
        loss_fn = partial(clj.distance_softmax_and_rows, temperature=2.0)
        softmax = clj.nnx.SoftmaxLoss(7, 2, loss_fn=loss_fn, rngs=nnx.Rngs(0))
        expected = clj.distance_softmax_and_rows(self.x, softmax.table[...], self.labels, temperature=2.0)
        chex.assert_trees_all_equal(softmax(self.x, self.labels), expected)

    @pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
    def test_the_table_starts_small_and_normal(self, dtype):
        table, other = (clj.nnx.SoftmaxLoss(500, 2, dtype=dtype, rngs=nnx.Rngs(seed)).table[...] for seed in range(2))
        chex.assert_shape(table, (500, 2))
        chex.assert_type(table, dtype)
        np.testing.assert_allclose(jnp.std(table.astype(jnp.float32)), 0.01, rtol=0.1)
        assert jnp.any(table != other)

    def test_the_table_is_a_variable_of_its_own_type(self):
        softmax = clj.nnx.SoftmaxLoss(7, 2, rngs=nnx.Rngs(0))
        assert not jax.tree.leaves(nnx.state(softmax, (nnx.Param, clj.nnx.Centers)))
        assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(softmax, clj.nnx.Table))] == [(7, 2)]


class SampledModel(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(6, 3, rngs=rngs)
        self.center = clj.nnx.CenterLoss(9, 3, rngs=rngs)
        init = nnx.initializers.normal(1.0)
        self.softmax = clj.nnx.SoftmaxLoss(9, 3, loss_fn=clj.class_softmax_and_rows, table_init=init, rngs=rngs)


ALL_THREE = clj.with_centers(optax.sgd(0.1), classifier=clj.by_rows(optax.sgd(0.5, momentum=0.9)))


@both_modes
def test_an_nnx_optimizer_moves_the_table_of_a_sampled_softmax_by_rows(graph):
    model = SampledModel(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ALL_THREE, wrt=(nnx.Param, clj.nnx.Centers, clj.nnx.Table), graph=graph)
    images, labels = make_batch()
    classes = jnp.array([0, 1, 2, 3, 4, 8])

    @partial(nnx.jit, graph=graph)
    def train_step(model, optimizer):
        def loss_fn(model):
            features = model.inner(images)
            center, center_rows = model.center(features, labels)
            softmax, rows = model.softmax(features, labels, classes=classes)
            return softmax + center, (center_rows, rows)

        (_, (center_rows, rows)), grads = nnx.value_and_grad(loss_fn, has_aux=True, graph=graph)(model)
        grads.center = {'centers': clj.nnx.Centers(center_rows)}
        grads.softmax = {'table': clj.nnx.Table(rows)}
        optimizer.update(model, grads)
        return rows

    before = nnx_arrays(model)
    rows: Any = train_step(model, optimizer)
    expected = np.array(before['softmax']['table'])
    expected[classes] -= 0.5 * np.asarray(rows.values)
    np.testing.assert_allclose(model.softmax.table[...], expected, rtol=1e-6, atol=1e-6)
    after = nnx_arrays(model)
    assert all(np.any(np.not_equal(*pair)) for pair in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_a_linen_softmax_inside_nnx_has_its_table_in_a_table():
    x, labels = np.ones((4, 3), np.float32), np.arange(4)
    model: Any = bridge.ToNNX(clj.linen.SoftmaxLoss(5), rngs=nnx.Rngs(0)).lazy_init(x, labels)
    assert isinstance(model.table, clj.nnx.Table)

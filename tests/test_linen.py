"""linen.CenterLoss and linen.SoftmaxLoss: the modules, and train steps with a flax TrainState."""

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import meta
from flax.training.train_state import TrainState

import centerloss_jax as clj
from tests.support import oracle
from tests.support.steps import center_state, linen_state, linen_step, linen_table, make_batch, update

jitted = jax.jit(linen_step, donate_argnums=0)
both_models = pytest.mark.parametrize('batch_norm', [False, True], ids=['plain', 'BatchNorm'])


def train_step(state, images, labels, center_weight=1.0):
    """Runs the one compiled step of this file, which donates the state."""
    return jitted(state, images, labels, center_weight=center_weight)


def inference(state, images):
    """Evaluates the model without labels and without centers."""
    return state.apply_fn({'params': state.params['params'], 'batch_stats': state.batch_stats}, images)


class TestModule:
    x, labels = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32), np.array([0, 2, 1, 0])

    def test_returns_center_loss_and_rows_of_its_table(self, worked_example):
        center = clj.linen.CenterLoss(3, centers_init=lambda key, shape, dtype: worked_example.centers)
        (loss, rows), variables = center.init_with_output(jax.random.key(0), self.x, self.labels)
        assert loss == 4.75
        assert jax.tree.map(jnp.shape, variables) == {'centers': {'centers': (3, 2)}}
        _, expected = clj.center_loss_and_rows(self.x, worked_example.centers, self.labels)
        chex.assert_trees_all_equal(rows, expected)

    def test_passes_every_option_on(self):
        center, labels = clj.linen.CenterLoss(3), np.array([0, 2, 1, -1])
        options = {
            'where': np.array([True, False, True, True]),
            'weights': np.arange(4.0),
            'reduce_fn': jnp.sum,
        }
        variables = center.init(jax.random.key(0), self.x, labels)
        got = center.apply(variables, self.x, labels, **options)
        expected = clj.center_loss_and_rows(self.x, np.zeros((3, 2), np.float32), labels, **options)
        chex.assert_trees_all_equal(got, expected)

    def test_passes_axis_name_on(self):
        center = clj.linen.CenterLoss(3)
        variables = center.init(jax.random.key(0), self.x, self.labels)
        with pytest.raises(NameError, match=r"axis_name='btach'"):
            center.apply(variables, self.x, self.labels, axis_name='btach')

    @pytest.mark.parametrize('module', [clj.linen.CenterLoss(3), clj.linen.SoftmaxLoss(3)], ids=['center', 'softmax'])
    def test_features_of_sequences_give_the_number_of_features(self, module):
        variables = module.init(jax.random.key(0), self.x.reshape(1, 4, 2), self.labels.reshape(1, 4))
        assert [table.shape for table in jax.tree.leaves(variables)] == [(3, 2)]

    def test_centers_start_at_zero_in_float32(self):
        variables = clj.linen.CenterLoss(7).init(jax.random.key(0), self.x, self.labels)
        np.testing.assert_array_equal(variables['centers']['centers'], np.zeros((7, 2)))
        chex.assert_type(variables['centers']['centers'], jnp.float32)

    @pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_initializer_and_dtype(self, dtype):
        center = clj.linen.CenterLoss(500, centers_init=nn.initializers.normal(2.0), dtype=dtype)
        variables = center.init(jax.random.key(0), self.x, self.labels)
        table: Any = variables['centers']['centers']
        chex.assert_shape(table, (500, 2))
        chex.assert_type(table, dtype)
        np.testing.assert_allclose(jnp.std(table.astype(jnp.float32)), 2.0, rtol=0.1)
        loss, _ = center.apply(variables, self.x.astype(jnp.bfloat16), self.labels)
        chex.assert_type(loss, jnp.float32)
        other = center.init(jax.random.key(1), self.x, self.labels)['centers']['centers']
        assert np.any(np.asarray(table) != np.asarray(other))

    def test_the_table_may_start_from_class_means(self):
        rng = np.random.default_rng(0)
        labels = np.array([0, 0, 0, 1, 1, 2])
        x = rng.normal(size=(6, 16))
        x = (20 * x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        zeros = clj.linen.CenterLoss(3)
        loss, _ = zeros.apply(zeros.init(jax.random.key(0), x, labels), x, labels)
        np.testing.assert_allclose(loss, 400, rtol=1e-5)

        within = oracle.class_statistics(x, labels, 3).intra * (6 - 3) / 6
        means = clj.class_statistics(x, labels, 3).mean
        center = clj.linen.CenterLoss(3, centers_init=lambda key, shape, dtype: means.astype(dtype))
        by_initializer = center.init(jax.random.key(0), x, labels)
        for variables in (by_initializer, {'centers': {'centers': means}}):
            loss, _ = zeros.apply(variables, x, labels)
            np.testing.assert_allclose(loss, within, rtol=1e-5)

    @pytest.mark.parametrize('num_classes', [0, -2])
    def test_needs_at_least_one_class(self, num_classes):
        with pytest.raises(ValueError, match=f'num_classes.*{num_classes}'):
            clj.linen.CenterLoss(num_classes).init(jax.random.key(0), self.x, self.labels)

    @pytest.mark.parametrize('shape', [(2, 3), (3,), (3, 3), (1, 2)], ids=str)
    def test_an_initializer_of_another_shape_is_named(self, shape):
        center = clj.linen.CenterLoss(3, centers_init=lambda *_: jnp.zeros(shape))
        with pytest.raises(ValueError, match=rf'centers_init.*\[3, 2\].*{re.escape(str(list(shape)))}'):
            center.init(jax.random.key(0), self.x, self.labels)


class TestStep:
    @both_models
    def test_centers_move_by_eq_4_from_the_centers_of_the_loss(self, batch_norm):
        images, labels = make_batch(left_out=[3])
        state = linen_state(alpha=0.5, batch_norm=batch_norm)
        features, table = -self.rows(state, images, labels).values, np.zeros((5, 3))
        np.testing.assert_array_equal(linen_table(state), table)
        new, _ = train_step(state, images, labels)
        expected = oracle.center_update(features, table, labels, 0.5)
        np.testing.assert_allclose(linen_table(new), expected, rtol=1e-5, atol=1e-6)
        move = np.linalg.norm(linen_table(new))
        np.testing.assert_allclose(center_state(new.opt_state).step_norm, move, rtol=1e-5)

    @staticmethod
    def rows(state, images, labels):
        variables = {**state.params, 'batch_stats': state.batch_stats}
        (*_, rows), _ = state.apply_fn(variables, images, labels, train=True, mutable=['batch_stats'])
        return rows

    @staticmethod
    def collections(state):
        """Returns the collections as NumPy copies, which donation does not delete."""
        return jax.tree.map(np.asarray, {**state.params, 'batch_stats': state.batch_stats})

    @both_models
    def test_training_needs_only_batch_stats_mutable_and_evaluation_no_centers(self, batch_norm):
        batch, state = make_batch(), linen_state(batch_norm=batch_norm)
        losses = []
        for _ in range(30):
            before = self.collections(state)
            inference(state, batch.images)
            chex.assert_trees_all_equal(self.collections(state), before)
            state, loss = train_step(state, *batch)
            after = self.collections(state)
            for collection in before:
                for old, new in zip(*map(jax.tree.leaves, (before[collection], after[collection])), strict=True):
                    assert np.any(old != new), collection
            losses.append(float(loss))
        assert losses[-1] < 0.7 * losses[0]

    def test_one_trace_serves_every_step_and_a_short_last_batch(self):
        step = jax.jit(chex.assert_max_traces(linen_step, n=1))
        state = linen_state(batch_norm=True)
        for seed, left_out in enumerate([(), (), (5, 6, 7), range(8)]):
            before = np.asarray(linen_table(state))
            images, labels = make_batch(seed, left_out=left_out)
            state, loss = step(state, images, labels)
            absent = ~np.isin(np.arange(5), labels)
            np.testing.assert_array_equal(np.asarray(linen_table(state))[absent], before[absent])
            assert np.isfinite(loss)
        assert center_state(state.opt_state).dropped == 0
        assert center_state(state.opt_state).count == 4
        chex.clear_trace_counter()

    def test_a_padded_batch_equals_the_short_batch(self):
        images, labels = make_batch(left_out=[5, 6, 7])
        padded, loss = train_step(linen_state(), images, labels)
        short, expected_loss = train_step(linen_state(), images[:5], labels[:5])
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
        chex.assert_trees_all_close(padded.params, short.params, rtol=1e-5, atol=1e-6)

    def test_centers_do_not_depend_on_the_weight_of_the_loss(self):
        batch = make_batch()
        weak, strong = (train_step(linen_state(), *batch, weight)[0] for weight in (1e-4, 10.0))
        np.testing.assert_array_equal(linen_table(weak), linen_table(strong))
        assert np.any(linen_table(weak) != 0)
        kernels = (np.asarray(state.params['params']['Dense_0']['kernel']) for state in (weak, strong))
        assert np.any(np.not_equal(*kernels))

    @pytest.mark.parametrize('forgotten', ['rows', 'gradient of the table'])
    def test_a_step_that_passes_no_rows_is_an_error(self, forgotten):
        state = linen_state()
        grads = {'params': state.params['params']}
        if forgotten != 'rows':
            grads['centers'] = jax.tree.map(jnp.zeros_like, state.params['centers'])
        with pytest.raises((ValueError, TypeError), match='RowUpdates'):
            state.apply_gradients(grads=grads)


def test_the_module_may_be_nested_and_called_twice():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            center_loss = clj.linen.CenterLoss(5, name='center')
            passes = center_loss(x, labels), center_loss(nn.Dense(3)(x), labels)
            (first, first_rows), (second, second_rows) = passes
            return first + second, clj.concatenate_rows(first_rows, second_rows)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            return Head(name='head')(nn.Dense(3)(x), labels)

    images, labels = make_batch()
    variables = Model().init(jax.random.key(0), images, labels)
    transform = clj.with_centers(optax.sgd(0.1))
    rows: Any = Model().apply(variables, images, labels)[1]
    grads = {'params': variables['params'], 'centers': {'head': {'center': {'centers': rows}}}}
    new, state = update(transform, grads, transform.init(variables), variables)
    moved = new['centers']['head']['center']['centers']
    expected = oracle.center_update(-rows.values, np.zeros((5, 3)), np.tile(labels, 2), 0.5)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    assert center_state(state).dropped == 0


def test_the_table_may_be_boxed_with_the_names_of_its_axes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            init = nn.with_partitioning(nn.initializers.ones, ('classes', None))
            return clj.linen.CenterLoss(5, centers_init=init, name='center')(x, labels)

    x, labels = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 3
    params = {'params': jnp.ones(2), 'centers': Model().init(jax.random.key(0), x, labels)['centers']}
    assert nn.get_partition_spec(params['centers']) == {'center': {'centers': jax.P('classes', None)}}

    @jax.jit
    def step(params):
        transform = clj.with_centers(optax.adam(1e-3))
        _, rows = Model().apply({'centers': params['centers']}, x, labels)
        grads = {'params': jnp.ones(2), 'centers': {'center': {'centers': rows}}}
        return update(transform, grads, transform.init(params), params)

    moved, state = step(params)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    table = meta.unbox(moved)['centers']['center']['centers']
    expected = oracle.center_update(x, np.ones((5, 3)), labels, 0.5)
    np.testing.assert_allclose(table, expected, rtol=1e-5)
    np.testing.assert_allclose(center_state(state).step_norm, np.linalg.norm(expected - 1), rtol=1e-5)


class TestSoftmaxLoss:
    x, labels = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32), np.array([0, 2, 1, -1])

    @pytest.mark.parametrize(
        ('loss_fn', 'options'),
        [
            (
                clj.margin_softmax_and_rows,
                {'scale': 8.0, 'classes': np.arange(6), 'where': np.array([True, False] * 2)},
            ),
            (partial(clj.distance_softmax_and_rows, temperature=2.0), {'center_weight': 0.1, 'block_size': 2}),
        ],
        ids=['margin', 'distance'],
    )
    def test_returns_the_loss_and_rows_of_its_table_with_every_option(self, loss_fn, options):
        softmax = clj.linen.SoftmaxLoss(7, loss_fn)
        variables: Any = softmax.init(jax.random.key(0), self.x, self.labels, **options)
        assert jax.tree.map(jnp.shape, variables) == {'classifier': {'table': (7, 2)}}
        expected = loss_fn(self.x, variables['classifier']['table'], self.labels, **options)
        chex.assert_trees_all_equal(softmax.apply(variables, self.x, self.labels, **options), expected)

    def test_the_table_starts_small_and_normal(self):
        softmax = clj.linen.SoftmaxLoss(500, dtype=jnp.bfloat16)
        tables: Any = [softmax.init(jax.random.key(seed), self.x, self.labels)['classifier'] for seed in range(2)]
        table, other = (variables['table'] for variables in tables)
        chex.assert_shape(table, (500, 2))
        chex.assert_type(table, jnp.bfloat16)
        np.testing.assert_allclose(jnp.std(table.astype(jnp.float32)), 0.01, rtol=0.1)
        assert np.any(np.asarray(table) != np.asarray(other))

    def test_the_default_is_a_margin_softmax(self):
        softmax = clj.linen.SoftmaxLoss(3)
        variables: Any = softmax.init(jax.random.key(0), self.x, self.labels)
        chex.assert_type(variables['classifier']['table'], jnp.float32)
        expected = clj.margin_softmax_and_rows(self.x, variables['classifier']['table'], self.labels)
        chex.assert_trees_all_equal(softmax.apply(variables, self.x, self.labels), expected)


BY_ROWS = clj.by_rows(optax.sgd(0.5, momentum=0.9))
ALL_THREE = clj.with_centers(optax.sgd(0.1), classifier=BY_ROWS)


class SampledModel(nn.Module):
    table_init: Any

    @nn.compact
    def __call__(self, images, labels, **options):
        features = nn.Dense(3)(images)
        center, center_rows = clj.linen.CenterLoss(9, name='center')(features, labels)
        softmax_loss = clj.linen.SoftmaxLoss(9, clj.class_softmax_and_rows, self.table_init, name='softmax')
        softmax, rows = softmax_loss(features, labels, **options)
        return softmax + center, (center_rows, rows)


@pytest.mark.parametrize('boxed', [False, True])
def test_a_train_state_moves_the_table_of_a_sampled_softmax_by_rows(boxed):
    init = nn.initializers.normal(1.0)
    model = SampledModel(nn.with_partitioning(init, ('classes', None)) if boxed else init)
    images, labels = make_batch()
    classes = jnp.array([0, 1, 2, 3, 4, 8])
    variables = model.init(jax.random.key(0), images, labels)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=ALL_THREE)

    @jax.jit
    def train_step(state):
        def loss_fn(params):
            return state.apply_fn({**state.params, 'params': params}, images, labels, classes=classes)

        (_, (center_rows, rows)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
        tables = {'centers': {'center': {'centers': center_rows}}, 'classifier': {'softmax': {'table': rows}}}
        return state.apply_gradients(grads={'params': grads, **tables}), rows

    new, rows = train_step(state)
    old_table, new_table = (meta.unbox(s.params)['classifier']['softmax']['table'] for s in (state, new))
    expected = np.array(old_table)
    expected[classes] -= 0.5 * np.asarray(rows.values)
    np.testing.assert_allclose(new_table, expected, rtol=1e-6, atol=1e-6)
    assert np.any(np.asarray(new_table)[8] != np.asarray(old_table)[8])
    leaves = map(jax.tree.leaves, (state.params, new.params))
    assert all(np.any(np.not_equal(*pair)) for pair in zip(*leaves, strict=True))
    assert optax.tree.get(new.opt_state, 'rows_dropped') == 0
    assert jax.tree.structure(new.params) == jax.tree.structure(state.params)

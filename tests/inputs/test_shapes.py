"""Shapes and dtypes of every array function, as written, under jit and under pmap."""

from functools import partial
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from flax import nnx

import centerloss_jax as clj
from tests.support.problems import make_problem

# Any, since chex annotates a decorator as an object and a variant as a function that never returns.
variants: Any = chex.variants(with_jit=True, without_jit=True, with_pmap=True)
leading_dimensions = parameterized.named_parameters(('one', ()), ('sequences', (2, 4)))


class ShapesTest(chex.TestCase):
    variant: Any

    @variants
    @leading_dimensions
    def test_center_loss(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        loss = self.variant(clj.center_loss)(*problem.arrays)
        chex.assert_shape(loss, ())
        chex.assert_type(loss, jnp.float32)

    @variants
    @leading_dimensions
    def test_center_loss_per_example(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        per_example = self.variant(partial(clj.center_loss, reduce_fn=None))(*problem.arrays)
        chex.assert_shape(per_example, leading)
        chex.assert_type(per_example, jnp.float32)

    @variants
    @leading_dimensions
    def test_center_rows(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        rows = self.variant(clj.center_rows)(*problem.arrays)
        num_examples = int(np.prod(leading))
        chex.assert_shape([rows.indices, rows.values], [(num_examples,), (num_examples, 3)])
        chex.assert_type([rows.indices, rows.values], [jnp.int32, jnp.float32])

    @variants
    @leading_dimensions
    def test_center_loss_and_rows(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        loss, rows = self.variant(clj.center_loss_and_rows)(*problem.arrays)
        num_examples = int(np.prod(leading))
        chex.assert_shape([loss, rows.indices, rows.values], [(), (num_examples,), (num_examples, 3)])
        chex.assert_type([loss, rows.indices, rows.values], [jnp.float32, jnp.int32, jnp.float32])

    @variants
    def test_concatenate_rows(self):
        first, second = (clj.RowUpdates(jnp.arange(size), jnp.ones((size, 3))) for size in (2, 5))
        rows = self.variant(clj.concatenate_rows)(first, second)
        chex.assert_shape([rows.indices, rows.values], [(7,), (7, 3)])
        chex.assert_type([rows.indices, rows.values], [jnp.int32, jnp.float32])

    @variants
    def test_table_and_rows(self):
        rows = clj.RowUpdates(jnp.arange(2), jnp.ones((2, 3)))
        table = self.variant(lambda table, rows: table + rows)(jnp.ones((5, 3)), rows)
        chex.assert_shape(table, (5, 3))
        chex.assert_type(table, jnp.float32)

    @variants
    @leading_dimensions
    def test_nearest_center(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        labels, distances = self.variant(partial(clj.nearest_center, block_size=2))(problem.x, problem.centers)
        chex.assert_shape([labels, distances], leading)
        chex.assert_type([labels, distances], [jnp.int32, jnp.float32])

    @variants
    @leading_dimensions
    def test_class_statistics(self, leading):
        problem = make_problem(leading=leading, dtype=np.float32)
        stats = self.variant(partial(clj.class_statistics, num_classes=5))(problem.x, problem.labels)
        chex.assert_shape([stats.count, stats.mean], [(5,), (5, 3)])
        chex.assert_shape([stats.intra, stats.inter, stats.ratio], ())
        chex.assert_type([stats.mean, stats.intra, stats.inter, stats.ratio], jnp.float32)

    @variants
    def test_center_update(self):
        transform: Any = clj.center_update(0.5)
        rows = clj.RowUpdates(jnp.arange(2), jnp.ones((2, 3)))
        state = transform.init(None)
        updates, state = self.variant(lambda rows, state: transform.update(rows, state))(rows, state)
        chex.assert_shape([updates.indices, updates.values], [(2,), (2, 3)])
        chex.assert_shape(list(state), ())
        chex.assert_type([updates.values, *state], [jnp.float32, jnp.int32, jnp.int32, jnp.float32])

    @variants
    def test_with_centers(self):
        transform: Any = clj.with_centers(optax.sgd(0.1))
        tree = {'params': jnp.ones(4), 'centers': jnp.ones((5, 3))}
        rows = clj.RowUpdates(jnp.arange(2), jnp.ones((2, 3)))

        def step(tree, rows):
            updates, _ = transform.update({'params': tree['params'], 'centers': rows}, transform.init(tree), tree)
            return optax.apply_updates(tree, updates)

        moved = self.variant(step)(tree, rows)
        chex.assert_shape([moved['params'], moved['centers']], [(4,), (5, 3)])
        chex.assert_type([moved['params'], moved['centers']], jnp.float32)

    @variants
    def test_the_linen_module(self):
        problem = make_problem(leading=(7,), dtype=np.float32)
        module = clj.linen.CenterLoss(len(problem.centers))
        variables = {'centers': {'centers': problem.centers}}
        loss, rows = self.variant(module.apply)(variables, problem.x, problem.labels)
        chex.assert_shape([loss, rows.values], [(), (7, 3)])
        chex.assert_type([loss, rows.values], jnp.float32)

    @variants
    def test_the_nnx_module(self):
        problem = make_problem(leading=(7,), dtype=np.float32)

        def call(x, centers, labels):
            init = lambda *_: centers  # noqa: E731  # an initializer
            return clj.nnx.CenterLoss(*centers.shape, centers_init=init, rngs=nnx.Rngs(0))(x, labels)

        loss, rows = self.variant(call)(*problem.arrays)
        chex.assert_shape([loss, rows.values], [(), (7, 3)])
        chex.assert_type([loss, rows.values], jnp.float32)

"""The softmax losses over classes: values and gradients against the oracle and dense autodiff, extremes, samples."""

from functools import cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType

import centerloss_jax as clj
from centerloss_jax import _kernels
from tests.support import oracle
from tests.support.cases import some_by_default
from tests.support.problems import make_problem

# The losses with and without rows, and the logit of the oracle.
LOSSES: dict[str, tuple[Any, Any, Any]] = {
    'class': (clj.class_softmax, clj.class_softmax_and_rows, oracle.class_logit),
    'margin': (clj.margin_softmax, clj.margin_softmax_and_rows, oracle.margin_logit),
    'distance': (clj.distance_softmax, clj.distance_softmax_and_rows, oracle.distance_logit),
}
COSFACE = {'scale': 5.0, 'angular_margin': 0.0, 'additive_margin': 0.3}
ARCFACE = {'scale': 6.0, 'angular_margin': 0.5, 'additive_margin': 0.1}
FORMS: dict[str, tuple[str, dict]] = {
    'class': ('class', {}),
    'CosFace': ('margin', COSFACE),
    'ArcFace': ('margin', ARCFACE),
    'straight through': ('margin', {**ARCFACE, 'straight_through': True}),
    'distance': ('distance', {'temperature': 7.0, 'margin': 0.2}),
}
over_forms = pytest.mark.parametrize(('name', 'options'), FORMS.values(), ids=FORMS.keys())
over_losses = pytest.mark.parametrize('name', LOSSES)


class Results(NamedTuple):
    loss: Any
    for_x: Any
    for_table: Any
    loss_with_rows: Any
    for_x_with_rows: Any
    rows: Any  # as a dense array


@cache
def program(name, straight_through):
    """Returns a program of a loss and its form with rows. Blocks of 4 classes."""
    loss, loss_and_rows, _ = LOSSES[name]
    static = {'straight_through': True} if straight_through else {}

    def run(x, table, labels, where, options):
        def plain(x, table):
            return loss(x, table, labels, where=where, block_size=4, **static, **options)

        def with_rows(x):
            return loss_and_rows(x, table, labels, where=where, block_size=4, **static, **options)

        value, (for_x, for_table) = jax.value_and_grad(plain, (0, 1))(x, table)
        (loss_with_rows, rows), for_x_with_rows = jax.value_and_grad(with_rows, has_aux=True)(x)
        return Results(value, for_x, for_table, loss_with_rows, for_x_with_rows, rows.values)

    return jax.jit(run)


def evaluate(name, x, table, labels, where=None, straight_through=False, **options) -> Results:
    where = np.ones(labels.shape, bool) if where is None else where
    with jax.enable_x64(x.dtype == np.float64):
        return jax.device_get(program(name, straight_through)(x, table, labels, where, options))


def assert_is_that_of_the_oracle(name, x, table, labels, tolerance, where=None, **options):
    """Compares gradients relative to the largest number of each."""
    loss, for_x, for_table = oracle.softmax(LOSSES[name][2], x, table, labels, where=where, **options)
    got = evaluate(name, x, table, labels, where, **options)
    for value in got.loss, got.loss_with_rows:
        np.testing.assert_allclose(value, loss, rtol=tolerance, atol=tolerance)
    for gradient in got.for_x, got.for_x_with_rows:
        np.testing.assert_allclose(gradient, for_x, atol=tolerance * max(1e-3, abs(for_x).max()))
    for gradient in got.for_table, got.rows:
        np.testing.assert_allclose(gradient, for_table, atol=tolerance * max(1e-3, abs(for_table).max()))
    return got


def problem(dtype: Any = np.float32, seed=0, masked=False):
    """Returns a problem of 6 examples of 4 features. 11 classes are three blocks, the last of them with padding."""
    return make_problem(seed, leading=(6,), num_classes=11, num_features=4, dtype=dtype, masked=masked)


@over_forms
@pytest.mark.parametrize(('dtype', 'tolerance'), [(np.float64, 1e-10), (np.float32, 1e-5)], ids=['float64', 'float32'])
@pytest.mark.parametrize('seed', range(3))
def test_losses_and_gradients_are_those_of_the_oracle(name, options, dtype, tolerance, seed):
    x, table, labels, mask = problem(dtype, seed, masked=True)
    got = assert_is_that_of_the_oracle(name, x, table, labels, tolerance, **mask, **options)
    assert got.loss > 0.5
    assert got.loss.dtype == got.rows.dtype == dtype


@pytest.mark.parametrize('num_rows', [1, 4, 7, 8])
def test_the_log_sum_exp_in_blocks_equals_the_plain_one(num_rows):
    rng = np.random.default_rng(0)
    x, rows, own = rng.normal(size=(5, 3)), rng.normal(size=(num_rows, 3)), rng.integers(0, num_rows, 5)
    padded, classes = np.append(rows, [[np.inf] * 3], axis=0), np.append(np.arange(num_rows), np.iinfo(np.int32).max)
    with jax.enable_x64(True):
        arrays = jnp.asarray(x), jnp.asarray(padded), jnp.asarray(classes), jnp.asarray(own)
        got = _kernels.log_sum_exp_of_others(lambda x, rows: x @ rows.T, *arrays, block_size=4)
    others = np.where(np.arange(num_rows) == own[:, None], -np.inf, x @ rows.T)
    if num_rows == 1:
        assert (np.exp(np.asarray(got)) == 0).all()
        assert np.isfinite(got).all()
    else:
        np.testing.assert_allclose(got, np.log(np.exp(others).sum(axis=1)), rtol=1e-12)


@over_losses
def test_one_class_has_the_loss_and_the_gradient_zero(name):
    x, table, *_ = problem()
    loss, gradients = jax.value_and_grad(LOSSES[name][0], (0, 1))(x, table[:1], np.zeros(6, int))
    assert loss == 0
    chex.assert_trees_all_equal(gradients, (jnp.zeros((6, 4)), jnp.zeros((1, 4))))


def test_leading_axes_are_free():
    x, table, labels, _ = make_problem(leading=(2, 3), num_classes=11, num_features=4, dtype=np.float32)
    flat = evaluate('class', x.reshape(6, 4), table, labels.reshape(6))
    loss, gradient = jax.value_and_grad(clj.class_softmax)(x, table, labels)
    np.testing.assert_allclose(loss, flat.loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, flat.for_x.reshape(2, 3, 4), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(clj.class_softmax(x[0, 0], table, labels[0, 0]), flat_loss_of_first(x, table, labels))


def flat_loss_of_first(x, table, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x[0, 0] @ table.T, labels[0, 0])


def with_angle(rows, theta):
    """Returns vectors at an angle from these rows, of other norms."""
    across = np.roll(rows, 1, axis=-1) * np.array([1, -1, 1, -1])
    across -= (across * rows).sum(-1, keepdims=True) / (rows * rows).sum(-1, keepdims=True) * rows
    across *= np.linalg.norm(rows, axis=-1, keepdims=True) / np.linalg.norm(across, axis=-1, keepdims=True)
    return 3 * (np.cos(theta) * rows + np.sin(theta) * across)


@pytest.mark.parametrize('straight_through', [False, True])
@pytest.mark.parametrize('theta', [0.002, 0.1, 1.5, np.pi - 0.505, np.pi - 0.495, np.pi - 0.1, np.pi - 0.002])
def test_the_margin_holds_at_every_angle(theta, straight_through):
    _, table, labels, _ = problem(np.float64)
    x = with_angle(table[labels], theta)
    options = {'scale': 64.0, 'angular_margin': 0.5, 'additive_margin': 0.0, 'straight_through': straight_through}
    assert_is_that_of_the_oracle('margin', x, table, labels, 1e-10, **options)
    # A float32 vector has its direction to 6e-8, so an angle of 0.002 has it to 3e-5.
    x, table = x.astype(np.float32), table.astype(np.float32)
    tolerance = 1e-5 + 4e-7 / np.sin(theta)
    assert_is_that_of_the_oracle('margin', x, table, labels, tolerance, **options)


@pytest.mark.parametrize('angular_margin', [0.0, 0.5])
@pytest.mark.parametrize('factor', [2.0, -0.5], ids=['0', 'pi'])
def test_at_an_angle_of_zero_or_pi_the_gradient_is_bounded(factor, angular_margin):
    _, table, labels, _ = problem()
    x = factor * table[labels]
    options = {'scale': 64.0, 'angular_margin': angular_margin, 'additive_margin': 0.2}
    got = evaluate('margin', x, table, labels, **options)
    value, _, _ = oracle.softmax(oracle.margin_logit, x, table, labels, straight_through=True, **options)
    np.testing.assert_allclose(got.loss, value, rtol=1e-5)
    bound = 2 * 64 / np.linalg.norm(x, axis=1) / 6
    assert (np.linalg.norm(got.for_x, axis=1) <= bound).all()
    assert np.isfinite(got.for_table).all()


@pytest.mark.parametrize('options', [COSFACE, ARCFACE], ids=['CosFace', 'ArcFace'])
def test_zero_features_and_zero_rows_have_the_cosine_zero_and_no_gradient(options):
    x, table, labels, _ = problem()
    x[[0, 1]], table[[labels[0], labels[2]]] = 0, 0
    got = assert_is_that_of_the_oracle('margin', x, table, labels, 1e-5, **options)
    np.testing.assert_array_equal(got.for_x[[0, 1]], np.zeros((2, 4)))
    np.testing.assert_array_equal(got.for_table[[labels[0], labels[2]]], np.zeros((2, 4)))


@over_losses
@pytest.mark.parametrize(('of_x', 'of_table'), [(1e4, 1e4), (1e4, 1e-4), (1e-20, 1e20)])
def test_large_and_small_norms_stay_finite(name, of_x, of_table):
    x, table, labels, _ = problem()
    x, table = (x * np.float32(of_x)).astype(np.float32), (table * np.float32(of_table)).astype(np.float32)
    table[3] = table[labels[0]]  # equal rows
    options = {'scale': 64.0, 'angular_margin': 0.5} if name == 'margin' else {}
    if name == 'distance':
        table *= np.float32(1e-3)  # squares of 1e20 are beyond float32
        chex.assert_tree_all_finite(evaluate(name, x, table, labels))
    else:
        chex.assert_tree_all_finite(assert_is_that_of_the_oracle(name, x, table, labels, 2e-5, **options))


def test_distances_are_exact_relative_to_the_spread_of_the_batch():
    x, table, labels, _ = problem(np.float64)
    x, table = (x + 1e4).astype(np.float32), (table + 1e4).astype(np.float32)
    labels[0] = -1
    spread = np.square(x[1:] - x[1:].mean(axis=0, dtype=np.float64)).sum(axis=1).max()
    spread = max(spread, np.square(table - x[1:].mean(axis=0, dtype=np.float64)).sum(axis=1).max())
    got = evaluate('distance', x, table, labels)
    expected = oracle.softmax(oracle.distance_logit, x, table, labels)
    np.testing.assert_allclose(got.loss, expected[0], atol=1e-6 * spread)
    np.testing.assert_allclose(got.for_table, expected[2], atol=1e-6 * spread * abs(expected[2]).max())


@over_losses
@pytest.mark.parametrize('content', [np.nan, np.inf, 1e30])
def test_an_ignored_example_changes_nothing(name, content):
    x, table, labels, _ = problem()
    where = np.arange(6) != 1
    labels[4] = -1
    expected = evaluate(name, x, table, labels, where)
    x[[1, 4]], labels[1] = content, 99
    got = evaluate(name, x, table, labels, where)
    chex.assert_trees_all_equal(got, expected)
    np.testing.assert_array_equal(got.for_x[[1, 4]], np.zeros((2, 4)))
    chex.assert_trees_all_equal(evaluate(name, x, table, np.full(6, -1)), jax.tree.map(np.zeros_like, got))


@over_losses
def test_inside_jit_a_label_out_of_range_makes_the_loss_nan_and_has_no_gradient(name):
    x, table, labels, _ = problem()
    labels[3] = -1
    without = evaluate(name, x, table, labels)
    labels[3] = 11
    got = evaluate(name, x, table, labels)
    assert np.isnan(got.loss)
    assert np.isnan(got.loss_with_rows)
    np.testing.assert_array_equal(got.for_x[3], np.zeros(4))
    # The mean divides by one example more, as that of the center loss does.
    chex.assert_trees_all_close(got.for_x * 6, without.for_x * 5, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(got.for_table * 6, without.for_table * 5, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r'labels\[3\] is 11'):
        LOSSES[name][0](x, table, labels)


@over_losses
@pytest.mark.parametrize('dtype', [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_is_computed_in_float32(name, dtype):
    x, table, labels, _ = problem()
    x, table = x.astype(dtype), table.astype(dtype)
    loss, for_x, for_table = oracle.softmax(LOSSES[name][2], x, table, labels)
    got = evaluate(name, x, table, labels)
    assert got.loss.dtype == got.rows.dtype == np.float32
    assert got.for_x.dtype == got.for_table.dtype == dtype
    np.testing.assert_allclose(got.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got.rows, for_table, rtol=1e-4, atol=1e-5 * abs(for_table).max())
    np.testing.assert_allclose(got.for_x.astype(np.float32), for_x, rtol=1e-2, atol=1e-2 * abs(for_x).max())


SAMPLE = np.array([0, 1, 2, 4, 7, 9, 10])


@over_losses
def test_the_loss_over_a_sample_is_that_of_its_rows(name):
    x, table, labels, _ = problem()
    labels = np.array([4, 0, 9, -1, 4, 7])
    _, loss_and_rows, logit = LOSSES[name]
    places = np.where(labels < 0, -1, np.searchsorted(SAMPLE, labels))
    loss, _, for_rows = oracle.softmax(logit, x, table[SAMPLE], places)
    got, rows = loss_and_rows(x, table, labels, classes=SAMPLE, block_size=4)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_array_equal(rows.indices, SAMPLE)
    np.testing.assert_allclose(rows.values, for_rows, rtol=1e-5, atol=1e-5 * abs(for_rows).max())
    assert rows.kind == 'gradient'


def test_a_label_that_is_not_in_the_sample_is_a_mistake():
    x, table, labels, _ = problem()
    labels = np.array([4, 0, 9, -1, 4, 3])
    with pytest.raises(ValueError, match=r'labels name class 3, which is not among classes'):
        clj.class_softmax_and_rows(x, table, labels, classes=SAMPLE)
    loss, rows = jax.jit(clj.class_softmax_and_rows)(x, table, labels, classes=SAMPLE)
    labels[5] = -1
    _, without = jax.jit(clj.class_softmax_and_rows)(x, table, labels, classes=SAMPLE)
    assert jnp.isnan(loss)
    np.testing.assert_allclose(rows.values * 5, without.values * 4, rtol=1e-5)


def test_sampled_rows_can_be_differentiated_by_the_user():
    x, table, labels, _ = problem()
    labels = np.array([4, 0, 9, -1, 4, 7])
    _, expected = clj.class_softmax_and_rows(x, table, labels, classes=SAMPLE)
    places = np.where(labels < 0, -1, np.searchsorted(SAMPLE, labels))
    gradient = jax.grad(clj.class_softmax, 1)(x, table[SAMPLE], places)
    rows = clj.RowUpdates(SAMPLE, gradient, kind='gradient')
    chex.assert_trees_all_close(rows, expected, rtol=1e-5, atol=1e-7)


def test_the_weight_multiplies_the_loss_and_the_rows():
    x, table, labels, _ = problem()
    loss, rows = clj.class_softmax_and_rows(x, table, labels)
    weighted = clj.class_softmax_and_rows(x, table, labels, weight=3.0)
    np.testing.assert_allclose(weighted[0], 3 * loss, rtol=1e-6)
    np.testing.assert_allclose(weighted[1].values, 3 * rows.values, rtol=1e-5, atol=1e-7)


def test_the_center_weight_adds_the_center_loss():
    x, table, labels, mask = problem(masked=True)
    loss, for_x, for_table = oracle.softmax(oracle.distance_logit, x, table, labels, **mask)
    center_loss = oracle.center_loss(x, table, labels, **mask)
    center_for_x, center_for_table, _ = oracle.center_loss_gradients(x, table, labels, **mask)

    def both(x):
        return clj.distance_softmax_and_rows(x, table, labels, center_weight=0.7, weight=2.0, **mask)

    (value, rows), gradient = jax.value_and_grad(both, has_aux=True)(x)
    np.testing.assert_allclose(value, 2 * (loss + 0.7 * center_loss), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * (for_x + 0.7 * center_for_x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows.values, 2 * (for_table + 0.7 * center_for_table), rtol=1e-4, atol=1e-5)


def dense_class(x, table, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ table.T, labels).mean()


def dense_margin(x, table, labels):
    x, table = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (x, table))
    theta = jnp.arccos(x @ table.T)
    own = labels[:, None] == jnp.arange(len(table))
    cosine = jnp.where(own & (theta + 0.5 > jnp.pi), jnp.cos(theta) - 0.5 * jnp.sin(0.5), jnp.cos(theta + 0.5 * own))
    return optax.softmax_cross_entropy_with_integer_labels(6 * (cosine - 0.1 * own), labels).mean()


def dense_distance(x, table, labels):
    own = labels[:, None] == jnp.arange(len(table))
    logits = -jnp.sum((x[:, None] - table) ** 2, axis=-1) / 7 * (1 + 0.2 * own)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


DENSE = {
    'class': (dense_class, 'class'),
    'margin': (dense_margin, 'ArcFace'),
    'distance': (dense_distance, 'distance'),
}


def derivatives(loss, x, table, labels):
    """Returns derivatives of the first and second order along some directions, in all modes."""
    directions = x[::-1] / 3, table[::-1] / 2

    def slope(x, table):  # in forward mode
        return jax.jvp(lambda x, table: loss(x, table, labels), (x, table), directions)[1]

    def gradient(x, table):
        return jax.grad(jax.checkpoint(loss), (0, 1))(x, table, labels)

    def along(x, table):  # in reverse mode
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(x, table), directions, strict=True))

    return {
        'forward': slope(x, table),
        'reverse': gradient(x, table),
        'forward over reverse': jax.jvp(gradient, (x, table), directions)[1],
        'reverse over forward': jax.grad(slope, (0, 1))(x, table),
        'reverse over reverse': jax.grad(along, (0, 1))(x, table),
        'vmap': jax.vmap(jax.grad(loss), in_axes=(0, None, 0))(jnp.stack([x, 2 * x]), table, jnp.stack([labels] * 2)),
    }


WITHOUT_ROWS = {name: (name, False) for name in DENSE}


@pytest.mark.parametrize(
    ('name', 'with_rows'), some_by_default(WITHOUT_ROWS | {'class, with rows': ('class', True)}, 'class')
)
def test_derivatives_of_every_mode_and_order_are_those_of_dense_autodiff(name, with_rows):
    x, table, labels, _ = make_problem(leading=(5,), num_classes=5, num_features=3)
    options = {'block_size': 3, **FORMS[DENSE[name][1]][1]}

    def loss(x, table, labels):
        if with_rows:
            return LOSSES[name][1](x, table, labels, **options)[0]
        return LOSSES[name][0](x, table, labels, **options)

    with jax.enable_x64(True):
        expected = jax.jit(lambda *args: derivatives(DENSE[name][0], *args))(x, table, labels)
        got = jax.jit(lambda *args: derivatives(loss, *args))(x, table, labels)
    chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('name', ['margin', 'distance'])
def test_numbers_of_a_loss_can_be_traced_and_differentiated(name):
    x, table, labels, _ = problem()
    options = {'margin': ARCFACE, 'distance': {'temperature': 7.0, 'margin': 0.2}}[name]
    plain, with_rows, _ = LOSSES[name]
    expected = jax.grad(lambda options: plain(x, table, labels, **options))(options)
    got = jax.grad(lambda options: with_rows(x, table, labels, weight=2.0, **options)[0])(options)
    chex.assert_trees_all_close(got, jax.tree.map(lambda a: 2 * a, expected), rtol=1e-5)
    nudged = {key: number * 1.01 for key, number in options.items()}
    change = plain(x, table, labels, **nudged) - plain(x, table, labels, **options)
    np.testing.assert_allclose(sum(0.01 * options[key] * expected[key] for key in options), change, rtol=0.05)


def test_rows_carry_no_gradient():
    x, table, labels, _ = problem()
    gradient = jax.grad(lambda x: jnp.sum(clj.class_softmax_and_rows(x, table, labels)[1].values))(x)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_a_vmapped_step_stacks_its_rows():
    x, table, labels, _ = problem()
    batches = np.stack([x, x[::-1]]), np.stack([labels, labels[::-1]])
    rows = jax.vmap(lambda x, labels: clj.class_softmax_and_rows(x, table, labels)[1])(*batches)
    expected = table + 2 * evaluate('class', x, table, labels).for_table
    np.testing.assert_allclose(table + clj.concatenate_rows(rows), expected, rtol=1e-5)


@over_losses
def test_a_batch_spread_over_devices_passes_the_check_of_shard_map(name):
    x, table, labels, _ = problem()
    mesh = jax.make_mesh((2,), ('batch',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def local(x, table, labels):
        loss, rows = LOSSES[name][1](x, table, labels)
        return jax.lax.pmean(loss, 'batch'), rows.values

    step = jax.shard_map(local, mesh=mesh, in_specs=(P('batch'), P(), P('batch')), out_specs=(P(), P('batch')))
    loss, rows = jax.eval_shape(step, x, table, labels)
    assert loss.shape == ()
    assert rows.shape == (22, 4)


def test_straight_through_has_the_derivative_for_the_scale():
    x, table, labels = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), [2, 0]

    def loss(scale, straight_through):
        margins: Any = {'angular_margin': 0.5, 'additive_margin': 0.1, 'straight_through': straight_through}
        return clj.margin_softmax(x, table, labels, scale=scale, **margins)

    for_scale = [jax.grad(loss)(5.0, straight_through) for straight_through in (False, True)]
    np.testing.assert_allclose(*for_scale, rtol=1e-5)


@pytest.mark.parametrize('classes', [None, SAMPLE], ids=['all', 'sample'])
def test_a_replicated_table_on_explicit_axes_gives_the_loss_of_one_device(classes):
    x, table, labels, _ = make_problem(leading=(8,), num_classes=11, num_features=4, dtype=np.float32)
    labels = SAMPLE[labels % len(SAMPLE)]
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Explicit,))
    put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))  # noqa: E731

    def loss_fn(x, table, labels):
        return clj.class_softmax_and_rows(x, table, labels, classes=classes, block_size=4)

    expected = jax.value_and_grad(loss_fn, has_aux=True)(x, table, labels)
    with jax.set_mesh(mesh):
        arrays = put(x, P('data')), put(table, P()), put(labels, P('data'))
        got = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(*arrays)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)

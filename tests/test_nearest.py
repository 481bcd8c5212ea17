"""nearest_center: exact squared distances, and the lowest class of equal ones."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding
from numpy.typing import DTypeLike

import centerloss_jax as clj
from centerloss_jax import _nearest
from tests.support import oracle
from tests.support.cases import some_by_default
from tests.support.programs import collective_sizes


def make_features(seed=0, leading=(7,), num_classes=11, num_features=3, dtype: DTypeLike = np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, (*leading, num_features)).astype(dtype)
    return x, rng.normal(1, 2, (num_classes, num_features)).astype(dtype)


jitted = jax.jit(clj.nearest_center, static_argnames='block_size')


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([((), 11), ((2, 3), 11), ((7,), 1), ((0,), 11)]),
    block_size=st.sampled_from([1, 4, 11, 64]),
)
def test_is_exact_in_float64_for_every_block_size(seed, sizes, block_size):
    x, centers = make_features(seed, *sizes, dtype=np.float64)
    with jax.enable_x64(True):
        labels, distances = jitted(x, centers, block_size=block_size)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def test_has_a_default_block_size():
    x, centers = make_features()
    labels, distances = clj.nearest_center(x, centers)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


@pytest.mark.parametrize('block_size', [1, 3, 4, 9])
def test_the_lowest_of_equal_centers_wins(block_size):
    # Equal within a block, across blocks, and by symmetry.
    centers = np.array([[9, 9], [1, 2], [1, 2], [9, 9], [1, 2], [3, 2], [1, 2]], np.float32)
    x = np.array([[1, 2], [9, 9], [2, 2], [2, 7]], np.float32)
    labels, distances = jitted(x, centers, block_size=block_size)
    np.testing.assert_array_equal(labels, [1, 0, 1, 1])
    np.testing.assert_array_equal(distances, [0, 0, 1, 26])


def test_large_norms_in_float32_keep_their_digits():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, 8))
    directions *= 1e4 / np.linalg.norm(directions, axis=-1, keepdims=True)
    # Two groups of centers, far from the origin and from each other. Within a group they are a few hundredths apart,
    # which the expanded square rounds away about any origin.
    centers = directions[np.arange(11) % 2] + rng.normal(scale=1e-2, size=(11, 8))
    centers = centers.astype(np.float32)
    true_labels = rng.permutation(np.arange(55) % 11)
    x = (centers[true_labels] + rng.normal(scale=2e-3, size=(55, 8))).astype(np.float32)
    labels, distances = jitted(x, centers, block_size=4)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(labels, true_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5)
    expanded = (x**2).sum(-1)[:, None] + (centers**2).sum(-1) - 2 * x @ centers.T
    assert np.abs(expanded.min(axis=1) - expected_distances).max() > expected_distances.max()


@pytest.mark.parametrize('block_size', [4, 64])
@pytest.mark.parametrize('spread', [0.3, 1.0, 3.0])
def test_rounding_of_large_norms_never_changes_the_label(spread, block_size):
    # Distances about as large as the rounding error of the squared norms, where some labels would be right by chance.
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, 8))
    directions *= 1e4 / np.linalg.norm(directions, axis=-1, keepdims=True)
    centers = (directions[np.arange(30) % 2] + rng.normal(scale=spread, size=(30, 8))).astype(np.float32)
    x = (centers[np.arange(200) % 30] + rng.normal(scale=spread, size=(200, 8))).astype(np.float32)
    labels, distances = jitted(x, centers, block_size=block_size)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16], ids=['bfloat16', 'float16'])
def test_half_precision_accumulates_in_float32(dtype):
    x = jnp.full((1, 512), 200, dtype)
    centers = jnp.stack([jnp.full(512, -200, dtype), jnp.zeros(512, dtype), jnp.full(512, -100, dtype)])
    labels, distances = clj.nearest_center(x, centers)
    chex.assert_type(distances, jnp.float32)
    assert labels[0] == 1
    assert distances[0] == 2.048e7


@pytest.mark.parametrize('block_size', [1, 4, 64])
def test_a_padding_row_is_never_the_nearest(block_size):
    x, centers = make_features()
    x[1], x[2], x[3], x[4] = np.nan, np.inf, -np.inf, 3e38
    padded = np.concatenate([centers, np.full((5, 3), np.inf, np.float32)])
    labels, distances = map(np.asarray, jitted(x, padded, block_size=block_size))
    assert np.all(labels < 11)
    healthy = np.array([0, 5, 6])
    expected_labels, expected_distances = oracle.nearest_center(x[healthy], centers)
    np.testing.assert_array_equal(labels[healthy], expected_labels)
    np.testing.assert_allclose(distances[healthy], expected_distances, rtol=1e-6)


def test_features_that_are_not_a_number_have_no_nearest_center():
    x, centers = make_features()
    x[2], x[5, 1] = np.nan, np.nan
    labels, distances = clj.nearest_center(x, centers, block_size=4)
    not_a_number = np.isin(np.arange(7), [2, 5])
    np.testing.assert_array_equal(labels == -1, not_a_number)
    np.testing.assert_array_equal(np.isnan(distances), not_a_number)


@pytest.mark.parametrize('content', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('block_size', [1, 4, 64])
def test_a_center_that_is_not_finite_is_never_the_nearest(content, block_size):
    x, centers = make_features()
    centers[0], centers[6, 1] = content, content
    finite = np.delete(np.arange(11), [0, 6])
    labels, distances = jitted(x, centers, block_size=block_size)
    expected_labels, expected_distances = oracle.nearest_center(x, centers[finite])
    np.testing.assert_array_equal(labels, finite[expected_labels])
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


@pytest.mark.parametrize('place', [0, 5, 10])
@pytest.mark.parametrize('far', [1e8, 1e12, 1e20, 3e38])
def test_one_center_far_away_does_not_change_the_others(far, place):
    x, centers = make_features()
    centers[place] = far
    labels, distances = jitted(x, centers, block_size=4)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


@pytest.mark.parametrize('far', [1e8, 1e18, 1e25, 3e38])
def test_an_example_far_away_has_the_center_at_its_place(far):
    x, centers = make_features()
    x[3] = centers[7] = far
    labels, distances = map(np.asarray, jitted(x, centers, block_size=4))
    others = np.arange(7) != 3
    assert labels[3] == 7
    assert distances[3] == 0
    expected_labels, expected_distances = oracle.nearest_center(x[others], centers)
    np.testing.assert_array_equal(labels[others], expected_labels)
    np.testing.assert_allclose(distances[others], expected_distances, rtol=1e-6)


@pytest.mark.parametrize('factor', [1e4, 1e5, 1e17])
def test_one_outlier_of_many_candidates_changes_no_other_example(factor):
    # Rounding leaves every center a candidate for the outlier, many more than are measured one by one.
    x, centers = make_features(leading=(16,), num_classes=300, num_features=8)
    x[5] *= factor
    labels, distances = jitted(x, centers, block_size=128)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    others = np.arange(16) != 5
    np.testing.assert_array_equal(labels[others], expected_labels[others])
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5)
    # In float32 several centers are as near to the outlier as the nearest one.
    squares = np.sum(np.square(x[5] - centers), axis=-1)
    np.testing.assert_allclose(squares[labels[5]], squares.min(), rtol=1e-6)


def test_an_outlier_is_set_aside_alone():
    # It would take as many rounds for all examples as there are centers.
    x, centers = make_features(leading=(16,), num_classes=100, num_features=8)
    block = _nearest.Block(jnp.int32(0), jnp.asarray(centers))
    best = _nearest.Best(jnp.full(16, -1, jnp.int32), jnp.full(16, jnp.inf, x.dtype))

    @jax.jit
    def set_aside(x):
        bounds = _nearest._lower_bounds(x, block, _nearest._origin(block.centers, x.dtype), jnp.ones(100, bool))
        return _nearest._search_block(x, block, bounds, best, jnp.zeros(16, bool))[1]

    assert not set_aside(x).any()
    x[5] *= 1e7
    np.testing.assert_array_equal(np.flatnonzero(set_aside(x)), [5])


def test_padding_rows_pass_under_debug_nans():
    x, centers = make_features()
    padded = np.concatenate([centers, np.full((5, 3), np.inf, np.float32)])
    with jax.debug_nans(True):
        labels, _ = clj.nearest_center(x, padded, block_size=4)
    np.testing.assert_array_equal(labels, oracle.nearest_center(x, centers)[0])


X, CENTERS = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32)

WRONG_ARGUMENTS = {
    'x without features': ({'x': np.float32(1)}, ValueError, r'\bx\b'),
    'centers as a vector': ({'centers': CENTERS[0]}, ValueError, r'centers.*[(\[]2,?[)\]]'),
    'other widths': ({'centers': np.ones((3, 5), np.float32)}, ValueError, r'(?=.*\bx\b)(?=.*centers).*5'),
    'a width to broadcast': ({'x': X[:, :1]}, ValueError, r'(?=.*\bx\b)(?=.*centers)(?=.*\b1\b).*\b2\b'),
    'integers': ({'x': np.ones((4, 2), np.int32)}, TypeError, r'\bx\b.*int32'),
    'integer centers': ({'centers': np.ones((3, 2), np.int32)}, TypeError, r'centers.*int32'),
    'no block': ({'block_size': 0}, ValueError, r'block_size.*0'),
    'a negative block': ({'block_size': -4}, ValueError, r'block_size.*-4'),
    'a fraction of a block': ({'block_size': 4.0}, ValueError, r'block_size.*4\.0'),
}


@pytest.mark.parametrize(('changed', 'error', 'message'), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments_are_named(changed, error, message):
    arguments = {'x': X, 'centers': CENTERS} | changed
    x, centers = arguments.pop('x'), arguments.pop('centers')
    with pytest.raises(error, match=message):
        clj.nearest_center(x, centers, **arguments)
    with pytest.raises(error, match=message):
        jax.eval_shape(partial(clj.nearest_center, **arguments), x, centers)


@pytest.mark.parametrize('block_size', [7, 1024])
def test_of_centers_that_coincide_the_lowest_class_wins(block_size):
    # More candidates than are measured one by one, and a nearer center after them.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    zeros = np.zeros((100, 4), np.float32)
    labels, distances = clj.nearest_center(x, zeros, block_size=block_size)
    np.testing.assert_array_equal(labels, np.zeros(9))
    np.testing.assert_allclose(distances, np.sum(x**2, axis=1), rtol=1e-6)
    table = np.concatenate([zeros, 0.9 * x, zeros, x, x])
    labels, distances = clj.nearest_center(x, table, block_size=block_size)
    np.testing.assert_array_equal(labels, 209 + np.arange(9))
    np.testing.assert_array_equal(distances, np.zeros(9))


@pytest.mark.parametrize('content', [0, np.nan, np.inf])
def test_two_tight_clusters_far_apart_and_a_center_that_is_not_finite(content):
    rng = np.random.default_rng(0)
    table = 1e4 * np.where(np.arange(200) % 2, 1, -1)[:, None] + 1e-2 * rng.normal(size=(200, 8))
    x = (table[rng.integers(0, 200, 50)] + 1e-2 * rng.normal(size=(50, 8))).astype(np.float32)
    table = table.astype(np.float32)
    table[199] = content
    expected = np.sum((x[:, None].astype(np.float64) - table) ** 2, axis=-1)
    labels, distances = clj.nearest_center(x, table)
    np.testing.assert_array_equal(labels, np.nanargmin(expected, axis=1))
    np.testing.assert_allclose(distances, np.nanmin(expected, axis=1), rtol=1e-5)


BOTH = ('data', 'classes')
LAYOUTS = {
    'Auto, replicated': (AxisType.Auto, P(), P(BOTH)),
    'Auto, by class': (AxisType.Auto, P('classes', None), P(BOTH)),
    'Auto, by class, batch over data': (AxisType.Auto, P('classes', None), P('data')),
    'Auto, by data': (AxisType.Auto, P('data', None), P(BOTH)),
    'Auto, over both': (AxisType.Auto, P(BOTH, None), P(BOTH)),
    'Explicit, by class': (AxisType.Explicit, P('classes', None), P(BOTH)),
    'Explicit, by class, batch over data': (AxisType.Explicit, P('classes', None), P('data')),
}


@pytest.fixture(scope='module')
def on_one_device():
    rng = np.random.default_rng(1)
    x, centers = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=(4093, 3)).astype(np.float32)
    return x, centers, oracle.nearest_center(x, centers)


@pytest.mark.parametrize(
    ('axis_type', 'spec', 'batch_spec'),
    some_by_default(LAYOUTS, 'Auto, by class, batch over data', 'Auto, over both', 'Explicit, by class'),
)
def test_the_nearest_center_is_the_same_on_a_mesh_and_no_table_travels(on_one_device, axis_type, spec, batch_spec):
    x, centers, (expected_labels, expected_distances) = on_one_device
    mesh = jax.make_mesh((2, 4), BOTH, axis_types=(axis_type,) * 2)
    table = clj.shard_centers(centers, NamedSharding(mesh, spec))
    batch = jax.device_put(x, NamedSharding(mesh, batch_spec))
    compiled = jax.jit(clj.nearest_center).lower(batch, table).compile()
    labels, distances = compiled(batch, table)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)
    if axis_type == AxisType.Explicit:
        assert labels.sharding.spec == distances.sharding.spec == batch_spec
    assert max(collective_sizes(compiled), default=0) < 512  # a device's shard of the table has 1,536 numbers


def test_a_table_on_a_mesh_can_be_searched_outside_of_jit():
    x, centers = make_features(num_classes=13)
    mesh = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
    table = clj.shard_centers(centers, NamedSharding(mesh, P('classes')))
    labels, distances = clj.nearest_center(x, table, block_size=4)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


def test_every_device_searches_the_whole_table(per_device):
    x, centers = make_features(leading=(2, 7))
    labels, distances = per_device(lambda x, centers: clj.nearest_center(x, centers, block_size=4), x, centers)
    expected_labels, expected_distances = oracle.nearest_center(x, centers)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


def test_the_block_size_may_be_a_numpy_integer():
    labels, _ = clj.nearest_center(X, CENTERS, block_size=np.int64(4))
    np.testing.assert_array_equal(labels, np.zeros(4))


@pytest.mark.parametrize('batch_spec', [P(), P('batch')], ids=['x replicated', 'x varies'])
@pytest.mark.parametrize('table_spec', [P(), P('batch')], ids=['one table', 'a table for each device'])
def test_a_shard_map_with_the_replication_check_takes_every_layout(batch_spec, table_spec):
    x, centers = make_features(leading=(8,), num_classes=12)
    mesh = jax.make_mesh((2,), ('batch',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = batch_spec, table_spec
    out = P() if batch_spec == table_spec == P() else P('batch')
    search = partial(clj.nearest_center, block_size=5)
    labels, distances = jax.jit(jax.shard_map(search, mesh=mesh, in_specs=specs, out_specs=out))(x, centers)
    xs, tables = (np.split(a, 2) if spec else [a, a] for a, spec in zip((x, centers), specs, strict=True))
    parts = [oracle.nearest_center(*part) for part in zip(xs, tables, strict=True)]
    expected_labels, expected_distances = parts[0] if out == P() else map(np.concatenate, zip(*parts, strict=True))
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)


def test_the_distance_has_a_gradient_for_the_features_and_for_the_centers():
    x, centers = make_features()
    x[2] = np.nan  # has no nearest center, and so no gradient for one
    rows = np.delete(np.arange(7), 2)

    @partial(jax.jit, static_argnums=2)
    def gradients(x, centers, block_size):
        def total(x, centers):
            distance = clj.nearest_center(x, centers, block_size=block_size)[1]
            return jnp.sum(jnp.where(jnp.arange(7) == 2, 0, distance))

        return jax.grad(total, (0, 1))(x, centers)

    labels, _ = oracle.nearest_center(x[rows], centers)
    difference = 2 * (x[rows] - centers[labels])
    for_centers = np.zeros_like(centers)
    np.subtract.at(for_centers, labels, difference)
    for block_size in (4, 64):
        for_x, got = gradients(x, centers, block_size)
        np.testing.assert_allclose(for_x[rows], difference, rtol=1e-5)
        np.testing.assert_array_equal(for_x[2], np.zeros(3))
        np.testing.assert_allclose(got, for_centers, rtol=1e-5, atol=1e-6)

"""Properties that hold for all inputs: extreme numbers, NaN, wrong labels, every mask and every dtype.

The quick profile of the suite tries a few examples of each. `.ci/nightly` tries thousands.
"""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support import oracle
from tests.support.extremes import FORMS, NUMBERS, coarse, extreme_problems, narrowed, results
from tests.support.steps import update

seeds = st.integers(0, 2**32 - 1)


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype
    bits = f'u{got.dtype.itemsize}'
    np.testing.assert_array_equal(np.asarray(got).view(bits), np.asarray(expected).view(bits))


def assert_equal(got, expected):
    """Compares numbers to the last bit, and a NaN with a NaN."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def assert_close(got, expected, magnitude, dtype=None):
    """Compares sums whose terms have these magnitudes; infinities and NaN must be the same."""
    limits = jnp.finfo(dtype or got.dtype)
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid='ignore', over='ignore'):
        error = np.abs(got - expected)
        close = error <= 16 * float(limits.eps) * np.abs(np.asarray(magnitude, np.float64)) + 4 * float(limits.tiny)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    np.testing.assert_array_equal(same | (close & np.isfinite(expected)), True, f'{got} is not {expected}')


def by_class(labels, terms, num_classes):
    """Returns the sum of the finite |terms| of each class."""
    named = ((labels >= 0) & (labels < num_classes)).reshape(-1)
    terms = np.abs(terms.reshape(-1, terms.shape[-1])[named].astype(np.float64))
    total = np.zeros((num_classes, terms.shape[-1]))
    np.add.at(total, labels.reshape(-1)[named], np.where(np.isfinite(terms), terms, 0))
    return total


def rows_by_class(problem, values):
    """Returns the sum of the |rows| of each class, without rows whose squared norm is not finite."""
    with np.errstate(over='ignore', invalid='ignore'):
        usable = np.isfinite(np.square(values).sum(-1, keepdims=True))
    return by_class(problem.labels, np.where(usable, values, 0), len(problem.centers))


def assert_centers_close(got, expected, problem):
    """Compares what is summed over the examples of a class."""
    centers = problem.centers.astype(np.float64)
    assert_close(got.for_centers, expected.for_centers, by_class(problem.labels, expected.for_x, len(centers)))
    magnitude = rows_by_class(problem, expected.values)
    assert_close(got.moved, expected.moved, np.abs(centers) + magnitude)
    assert_close(got.step_norm, expected.step_norm, np.linalg.norm(magnitude))


def rearranged(problem, change):
    """Returns the problem with every array of the batch changed."""
    options = {name: change(a) for name, a in problem.options.items()}
    return problem._replace(x=change(problem.x), labels=change(problem.labels), options=options)


@hypothesis.given(problem=extreme_problems(), seed=seeds)
def test_the_order_of_the_batch_does_not_matter(problem, seed):
    order = np.random.default_rng(seed).permutation(problem.labels.size)

    def permute(a):
        return a.reshape(len(order), *a.shape[problem.labels.ndim :])[order].reshape(a.shape)

    expected, got = results(problem), results(rearranged(problem, permute))
    assert_equal(got.per_example, permute(expected.per_example))
    assert_equal(got.for_x, permute(expected.for_x))
    assert_equal((got.nearest, got.distance), (permute(expected.nearest), permute(expected.distance)))
    assert_equal((got.dropped, got.statistics.count), (expected.dropped, expected.statistics.count))
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-6)
    assert_centers_close(got, expected, problem)


@hypothesis.given(problem=extreme_problems(), seed=seeds)
def test_the_order_of_the_classes_does_not_matter(problem, seed):
    num_classes = len(problem.centers)
    order = np.random.default_rng(seed).permutation(num_classes)
    labels = problem.labels.copy()
    named = (labels >= 0) & (labels < num_classes)
    labels[named] = np.argsort(order)[labels[named]]
    expected, got = results(problem), results(problem._replace(centers=problem.centers[order], labels=labels))
    for name in ('per_example', 'loss', 'for_x', 'values', 'dropped', 'distance'):
        assert_equal(getattr(got, name), getattr(expected, name))
    for name in ('moved', 'for_centers'):
        assert_equal(getattr(got, name), getattr(expected, name)[order])
    assert_equal(got.statistics, jax.tree.map(lambda a: a[order], expected.statistics))
    np.testing.assert_allclose(got.step_norm, expected.step_norm, rtol=1e-5)


@hypothesis.given(problem=extreme_problems(numbers=[0.0, -0.0]).map(coarse), seed=seeds)
def test_a_translation_of_features_and_centers_moves_the_result_along(problem, seed):
    shift = np.random.default_rng(seed).integers(-16, 17, problem.x.shape[-1]).astype(problem.x.dtype)
    expected, got = results(problem), results(problem._replace(x=problem.x + shift, centers=problem.centers + shift))
    for name in ('per_example', 'loss', 'for_x', 'for_centers', 'values', 'dropped', 'nearest', 'distance'):
        assert_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.step_norm, expected.step_norm, rtol=1e-6)
    magnitude = 64 + rows_by_class(problem, expected.values)
    shift = shift.astype(np.float64)
    assert_close(got.moved - shift, expected.moved, magnitude, problem.x.dtype)
    present = expected.statistics.count > 0
    for name in ('mean', 'squared_deviation'):
        moved = shift if name == 'mean' else 0.0
        got_there, expected_there = (getattr(r.statistics, name)[present] for r in (got, expected))
        np.testing.assert_allclose(got_there, expected_there + moved, rtol=1e-5, atol=1e-4)


@hypothesis.given(problem=extreme_problems(numbers=[0.0, -0.0]).map(coarse), exponent=st.integers(-40, 40))
def test_scaling_by_a_power_of_two_scales_the_result_to_the_bit(problem, exponent):
    narrow = problem.x.dtype.itemsize == 2  # float16 would underflow
    scale = 2.0 ** (exponent % 9 if narrow else exponent)
    factor = np.asarray(scale, problem.x.dtype)
    expected, got = results(problem), results(problem._replace(x=problem.x * factor, centers=problem.centers * factor))
    for name in ('per_example', 'loss', 'distance'):
        assert_equal(getattr(got, name), scale**2 * getattr(expected, name))
    for name in ('for_x', 'for_centers', 'values', 'moved', 'step_norm'):
        assert_equal(getattr(got, name).astype(np.float64), scale * getattr(expected, name).astype(np.float64))
    assert_equal((got.dropped, got.nearest), (expected.dropped, expected.nearest))
    assert_equal(got.statistics.mean, scale * expected.statistics.mean)
    assert_equal(got.statistics.squared_deviation, scale**2 * expected.statistics.squared_deviation)


@hypothesis.given(problem=extreme_problems(), alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_class_that_is_absent_keeps_every_bit_of_its_center(problem, alpha):
    got = results(problem, alpha)
    there = problem.labels[problem.options['where'] & np.isfinite(problem.x.astype(np.float64)).all(-1)]
    absent = ~np.isin(np.arange(len(problem.centers)), there)
    assert_same_bits(got.moved[absent], problem.centers[absent])
    counted = problem.labels[problem.options['where']]
    assert not got.for_centers[~np.isin(np.arange(len(problem.centers)), counted)].any()


def left_out(problem):
    return ~problem.options['where'] | (problem.labels < 0)


def filled_with_extremes(problem, seed):
    """Returns the problem with other contents for the examples that are left out."""
    rng, problem = np.random.default_rng(seed), rearranged(problem, np.copy)
    for array in (problem.x, problem.options.get('weights', problem.x)):
        array[left_out(problem)] = narrowed(rng.choice(NUMBERS, array[left_out(problem)].shape), array.dtype)
    out = left_out(problem)
    problem.labels[out] = np.where(problem.options['where'], -5, rng.choice([0, 3, 77, -1], problem.labels.shape))[out]
    return problem


@hypothesis.given(problem=extreme_problems(), seed=seeds)
def test_the_content_of_an_example_that_is_left_out_changes_no_bit(problem, seed):
    expected, got = results(problem), results(filled_with_extremes(problem, seed))
    for name in ('per_example', 'loss', 'for_x', 'for_centers', 'values', 'moved', 'dropped', 'step_norm'):
        assert_same_bits(getattr(got, name), getattr(expected, name))
    jax.tree.map(assert_same_bits, got.statistics, expected.statistics)


@hypothesis.given(problem=extreme_problems([form for form in FORMS if form['leading'] == (7,)]), seed=seeds)
def test_a_batch_that_is_padded_with_examples_left_out_gives_the_same_bits(problem, seed):
    padded = rearranged(problem, lambda a: np.concatenate([a, a, a[:2]]))
    padded.options['where'][7:] = False
    expected, got = results(problem), results(filled_with_extremes(padded, seed))
    for name in ('per_example', 'for_x', 'values'):
        assert_same_bits(getattr(got, name)[:7], getattr(expected, name))
        assert not getattr(got, name)[7:].any()
    for name in ('for_centers', 'moved', 'dropped'):
        assert_same_bits(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose([got.loss, got.step_norm], [expected.loss, expected.step_norm], rtol=1e-6)
    jax.tree.map(assert_same_bits, got.statistics, expected.statistics)


MESH = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))


def step(x, labels, options, centers, axis_name=None, mesh=None):
    """Returns the mean loss, its gradient, the moved centers, their state and statistics, for the whole batch."""
    mean = partial(jax.lax.pmean, axis_name=axis_name) if axis_name else lambda a: a

    def loss_fn(centers):
        loss, rows = clj.center_loss_and_rows(x, centers, labels, axis_name=axis_name, **options)
        return mean(loss), rows

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(centers)
    transform = clj.center_update(0.5, axis_name=axis_name, mesh=mesh)
    moved, state = update(transform, rows, transform.init(centers), centers)
    statistics = clj.class_statistics(x, labels, len(centers), where=options['where'], axis_name=axis_name)
    return loss, mean(gradient), moved, state, statistics


pmapped = jax.pmap(partial(step, axis_name='batch'), axis_name='batch', in_axes=(0, 0, 0, None))
shard_mapped = jax.jit(
    jax.shard_map(
        partial(step, axis_name='batch'),
        mesh=MESH,
        in_specs=(P('batch'), P('batch'), P('batch'), P()),
        out_specs=P(),
    )
)
over_mesh = jax.jit(partial(step, mesh=MESH))


def by_pmap(batch, centers):
    stacked = jax.device_get(pmapped(*jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), batch), centers))
    for leaf in jax.tree.leaves(stacked):
        assert_same_bits(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda a: a[0], stacked)


def by_mesh(batch, centers, table_spec):
    batch = jax.device_put(batch, NamedSharding(MESH, P('batch')))
    return over_mesh(*batch, clj.shard_centers(centers, NamedSharding(MESH, table_spec)))


WAYS = {
    'pmap': by_pmap,
    'shard_map': lambda batch, centers: shard_mapped(*batch, centers),
    'jit over a mesh': partial(by_mesh, table_spec=P()),
    'jit over a mesh, with a padded table': partial(by_mesh, table_spec=P('batch')),
}


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS.keys())
@hypothesis.given(problem=extreme_problems([form for form in FORMS if form['leading'] == (16,)]))
def test_a_batch_split_over_devices_gives_the_result_of_one_device(way, problem):
    x, centers, labels, options = problem
    expected = results(problem)
    with jax.enable_x64(x.dtype == np.float64):
        loss, for_centers, moved, state, statistics = jax.device_get(way((x, labels, options), centers))
    padding = moved[len(centers) :].astype(np.float64)
    np.testing.assert_array_equal(padding, np.full(padding.shape, np.inf))
    for_centers, moved, statistics = jax.tree.map(lambda a: a[: len(centers)], (for_centers, moved, statistics))
    got = expected._replace(for_centers=for_centers, moved=moved, step_norm=state.step_norm)
    assert_centers_close(got, expected, problem)
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-6)
    assert_equal((state.dropped, statistics.count), (expected.dropped, expected.statistics.count))


def classes_there(problem):
    """Returns which examples are counted, and which of these have a label of the table."""
    _, centers, labels, options = problem
    counted = options['where'] & (labels >= 0)
    in_table = labels < len(centers)
    padding = np.isposinf(centers[:, 0].astype(np.float64))  # as in a table padded for a mesh
    return counted, counted & in_table & ~padding[np.where(counted & in_table, labels, 0)]


def computed_in(problem):
    return np.float64 if problem.x.dtype == np.float64 else np.float32


@hypothesis.given(problem=extreme_problems())
def test_the_loss_and_its_gradients_are_those_of_the_oracle(problem):
    x, centers, labels, options = problem
    counted, valid = classes_there(problem)
    arrays, dtype = (x, centers, np.where(valid, labels, -1)), computed_in(problem)
    with np.errstate(all='ignore'):
        per_example = oracle.per_example(*arrays, **options)
        for_x, for_centers, _ = oracle.center_loss_gradients(*arrays, **options)
        share = valid.sum() / max(counted.sum(), 1)
        loss = per_example.sum() / max(counted.sum(), 1)
    got = results(problem)
    per_example = np.where(counted & ~valid, np.nan, narrowed(per_example, dtype))
    loss = np.nan if np.any(counted & ~valid) else narrowed(loss, dtype)
    assert_close(got.per_example, per_example, per_example)
    assert_close(got.loss, loss, loss)
    for_x, magnitude = share * for_x, by_class(arrays[2], share * for_x, len(centers))
    assert_close(got.for_x, narrowed(for_x, x.dtype), for_x)
    assert_close(got.for_centers, narrowed(share * for_centers, centers.dtype), magnitude)


@hypothesis.given(problem=extreme_problems(), alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_move_of_the_centers_is_that_of_the_oracle(problem, alpha):
    x, centers, labels, options = problem
    counted, valid = classes_there(problem)
    weights = options.get('weights', np.ones(labels.shape)).astype(np.float64)
    with np.errstate(all='ignore'):
        squares = oracle.per_example(x, centers, np.where(valid, labels, -1), where=valid, weights=weights**2)
        usable = valid & np.isfinite(narrowed(squares, computed_in(problem)))
        moved = oracle.center_update(x, centers, np.where(usable, labels, -1), alpha, **options)
    got = results(problem, alpha)
    assert got.dropped == np.sum(counted & ~usable)
    magnitude = rows_by_class(problem, got.values)
    assert_close(got.moved, moved, np.abs(centers.astype(np.float64)) + magnitude)
    there = np.unique(labels[usable])
    step_norm = np.linalg.norm(moved[there] - centers[there].astype(np.float64))
    assert_close(got.step_norm, step_norm, np.linalg.norm(magnitude))


@hypothesis.given(problem=extreme_problems(numbers=NUMBERS[:4]))
def test_statistics_are_those_of_the_oracle(problem):
    x, labels, where = problem.x, problem.labels, problem.options['where'] & (problem.labels < len(problem.centers))
    hypothesis.assume(np.any(where & (labels >= 0)))
    expected, got = oracle.class_statistics(x, labels, len(problem.centers), where=where), results(problem)
    assert_equal(got.statistics.count, expected.count)
    largest = np.abs(x.astype(np.float64)).max()
    assert_close(got.statistics.mean, expected.mean, largest)
    assert_close(got.intra, expected.intra, largest * x.shape[-1] * expected.intra)
    assert_close(got.inter, expected.inter, largest**2 * x.shape[-1])


@hypothesis.given(problem=extreme_problems())
def test_the_nearest_center_is_that_of_the_oracle(problem):
    x, centers, labels, _ = problem
    dtype = computed_in(problem)
    with np.errstate(all='ignore'):
        to_each = [oracle.per_example(x, centers, np.full(labels.shape, j)) for j in range(len(centers))]
        to_each = narrowed(np.stack(to_each, axis=-1), dtype).astype(np.float64)
        to_each = np.where(np.isfinite(to_each), to_each, np.inf)
    got, least = results(problem), to_each.min(-1)
    assert_equal(got.nearest == -1, least == np.inf)
    found = np.take_along_axis(to_each, got.nearest[..., None], -1)[..., 0]
    least = np.where(least < np.inf, least, np.nan)
    assert_close(got.distance, least, least)
    assert_close(np.where(got.nearest < 0, np.nan, found), least, least, dtype)

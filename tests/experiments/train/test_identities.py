"""Made identities: what their examples depend on, and the loss that the step takes them by."""

import jax
import numpy as np
import pytest

import centerloss_jax as clj
from experiments.train.identities import (
    EXAMPLES_OF_UNSEEN,
    LATENT,
    UNSEEN,
    Setup,
    identities_step,
    make_batch,
    make_examples,
    make_unseen,
    make_world,
    start_identities,
)

SETUP = Setup(num_classes=40, steps=5, batch_size=16, feature_dim=3, noise=0.8, unseen=7)


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    def batch(seed, step):
        world = make_world(seed)
        return make_batch(world, jax.random.fold_in(world.batches, step), SETUP)

    examples, labels = batch(3, 2)
    again, same = batch(3, 2)
    np.testing.assert_array_equal(examples, again)
    np.testing.assert_array_equal(labels, same)
    for other in (batch(3, 1), batch(4, 2)):
        assert not np.any(np.asarray(other[0]) == np.asarray(examples))
    assert len(np.unique(labels)) > 5


def test_an_identity_is_its_own_and_the_same_in_every_batch():
    world = make_world(0)
    without_nuisance = world._replace(hidden=world.hidden.at[LATENT:].set(0))
    identities = np.array([*range(50), UNSEEN, UNSEEN + 49, 2**32 - 1], np.uint32)
    examples = np.asarray(make_examples(without_nuisance, jax.random.key(1), identities, 0.0))
    assert np.unique(examples, axis=0).shape == examples.shape
    alone = make_examples(without_nuisance, jax.random.key(2), identities[[50, 7]], 0.0)
    np.testing.assert_allclose(alone, examples[[50, 7]], rtol=1e-5, atol=1e-6)


def test_two_examples_of_an_identity_are_nearer_than_those_of_two():
    world, identities = make_world(0), np.arange(100)
    one, two = (make_examples(world, jax.random.key(number), identities, 0.8) for number in (1, 2))
    distances = np.linalg.norm(np.asarray(one)[:, None] - np.asarray(two)[None], axis=-1)
    assert np.mean(np.diag(distances)) < 0.95 * np.mean(distances)


def test_unseen_identities_are_none_of_the_classes_and_do_not_depend_on_their_number():
    world = make_world(0)
    examples, identities = make_unseen(world, SETUP)
    assert examples.shape[0] == SETUP.unseen * EXAMPLES_OF_UNSEEN
    assert identities.min() >= UNSEEN > SETUP.num_classes
    assert set(np.unique(identities, return_counts=True)[1]) == {EXAMPLES_OF_UNSEEN}
    more, _ = make_unseen(world, SETUP._replace(num_classes=10**9))
    np.testing.assert_array_equal(examples, more)
    _, labels = make_batch(world, world.batches, SETUP._replace(batch_size=4096))
    assert set(np.asarray(labels).tolist()) == set(range(SETUP.num_classes))


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['class', 'margin', 'distance'])
def test_the_weight_multiplies_the_center_loss_of_the_features_that_the_softmax_sees(loss):
    world = make_world(0)
    start = start_identities(loss, 0, SETUP)
    key, _ = jax.random.split(jax.random.fold_in(world.batches, 0))
    examples, labels = make_batch(world, key, SETUP)
    features = np.asarray(start.apply_fn({'params': start.params['params']}, examples), np.float64)
    table = np.asarray(start.params['classifier'], np.float64)
    squares = {
        'class': np.sum(features**2, axis=1),  # the centers start from zero
        'margin': np.ones(len(features)),  # of features divided by their norms
        'distance': np.sum((features - table[np.asarray(labels)]) ** 2, axis=1),
    }
    totals = []
    for weight in (0.0, 0.5):
        state = start_identities(loss, 0, SETUP)
        state, total = identities_step(state, world, np.float32(weight), loss=loss, num_sampled=20, setup=SETUP)
        totals.append(float(total))
    np.testing.assert_allclose(totals[1] - totals[0], 0.5 * np.mean(squares[loss]), rtol=1e-4)
    key_of_sample = jax.random.split(jax.random.fold_in(world.batches, 0))[1]
    classes = np.asarray(clj.sample_classes(key_of_sample, labels, SETUP.num_classes, 20))
    moved = np.flatnonzero(np.any(np.asarray(state.params['classifier']) != np.asarray(table, np.float32), axis=1))
    np.testing.assert_array_equal(moved, classes)

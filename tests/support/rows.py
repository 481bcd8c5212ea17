"""A small table, rows for it, and the gradient arithmetic that must never turn rows into other rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import centerloss_jax as clj

TABLE = np.random.default_rng(0).normal(1, 2, (17, 3)).astype(np.float32)


def make_rows(*indices: int, seed: int = 1, num_features: int = 3) -> Any:
    """Returns random rows with these indices. Any, since optax's types do not know rows."""
    values = np.random.default_rng(seed).normal(size=(len(indices), num_features)).astype(np.float32)
    return clj.RowUpdates(jnp.array(indices, jnp.int32), jnp.asarray(values))


def of_floats(function):
    """Returns arithmetic on the floating leaves of rows alone, as users write it to spare integers."""

    def arithmetic(a, b):
        del b
        return jax.tree.map(lambda leaf: function(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, a)

    return arithmetic


# What users do to a whole tree of gradients. All dtypes stay, so nothing can be refused when traced:
# such rows must move no center. 7 + 7 is 14, 3 + 4 is 7 and 3 * 3 is 9, which are other rows of the table.
MOVES_NOTHING = {
    'added': lambda a, b: jax.tree.map(jnp.add, a, b),
    'added to itself': lambda a, b: jax.tree.map(jnp.add, a, a),
    'added twice': lambda a, b: jax.tree.map(lambda *leaves: sum(leaves), a, b, a),
    'subtracted': lambda a, b: jax.tree.map(jnp.subtract, a, b),
    'times an integer': lambda a, b: jax.tree.map(lambda leaf: 2 * leaf, a),
    'negated': lambda a, b: jax.tree.map(jnp.negative, a),
    'zeroed': lambda a, b: jax.tree.map(jnp.zeros_like, a),
    'multiplied': lambda a, b: jax.tree.map(jnp.multiply, a, b),
    'squared': lambda a, b: jax.tree.map(jnp.square, a),
    'clipped to whole numbers': lambda a, b: optax.clip(1).update(a, optax.EmptyState())[0],
    'clipped to larger whole numbers': lambda a, b: jax.tree.map(lambda leaf: jnp.clip(leaf, -5, 5), a),
    'reduced to signs': lambda a, b: jax.tree.map(jnp.sign, a),
    'floats halved': of_floats(lambda leaf: 0.5 * leaf),
    'floats divided': of_floats(lambda leaf: leaf / 3),
    'floats zeroed': of_floats(jnp.zeros_like),
    'floats clipped': of_floats(lambda leaf: jnp.clip(leaf, -1, 1)),
    'floats clipped far out': of_floats(lambda leaf: jnp.clip(leaf, -1e4, 1e4)),
    'floats clipped from below': of_floats(lambda leaf: jnp.maximum(leaf, -10)),
    'floats clipped from above': of_floats(lambda leaf: jnp.minimum(leaf, 1)),
    'floats rounded to whole numbers': of_floats(jnp.round),
    'floats normalized': of_floats(lambda leaf: leaf / jnp.linalg.norm(leaf)),
    'floats rounded to bfloat16 and back': of_floats(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype)),
    'centralized': lambda a, b: optax.centralize().update(a, optax.EmptyState())[0],
}

# Arithmetic that changes the dtype of a leaf, which shows when it is traced.
IS_REFUSED = {
    'averaged': lambda a, b: jax.tree.map(lambda p, q: (p + q) / 2, a, b),
    'interpolated': lambda a, b: jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, a, b),
    'scaled by a number': lambda a, b: jax.tree.map(lambda leaf: 0.1 * leaf, a),
    'scaled by an array': lambda a, b: jax.tree.map(lambda leaf: jnp.float32(1) * leaf, a),
    'clipped': lambda a, b: jax.tree.map(lambda leaf: jnp.clip(leaf, -1.0, 1.0), a),
    'cast': lambda a, b: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), a),
    'floats cast': of_floats(lambda leaf: leaf.astype(jnp.bfloat16)),
}

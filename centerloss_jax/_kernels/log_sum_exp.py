"""The log-sum-exp over the classes of a large table, in blocks."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._inputs import DROPPED
from centerloss_jax._sharding import vary_as


def log_sum_exp_of_others(
    logits: Callable[[Array, Array], Array], x: Array, rows: Array, classes: Array, own: Array, block_size: int
) -> Array:
    """Returns the log of the sum of exp(logit) over the rows that are not an example's own, `[B]`.

    left_out = (classes == own[:, None]) | (classes == DROPPED)
    return jax.nn.logsumexp(jnp.where(left_out, -jnp.inf, logits(x, rows)), axis=-1)

    Takes the rows in blocks and keeps `[B, block]`, never `[B, N]`. The checkpoint makes a derivative compute the
    logits of a block again. Half of the lowest number leaves a row out, and is the result where no other row is left:
    with -Inf, derivatives would hold Inf - Inf, a NaN. For the same reason a row of the class DROPPED is read as 0.
    """
    num_rows, num_features = rows.shape
    num_blocks = -(-num_rows // block_size)
    block_size = -(-num_rows // num_blocks)
    padding = num_blocks * block_size - num_rows
    blocks = jnp.pad(rows, ((0, padding), (0, 0))).reshape(num_blocks, block_size, num_features)
    classes = jnp.pad(classes, (0, padding), constant_values=DROPPED).reshape(num_blocks, block_size)
    lowest = jnp.asarray(jnp.finfo(x.dtype).min / 2, x.dtype)

    @partial(jax.checkpoint, prevent_cse=False)
    def add_block(total, block):
        rows, classes = block
        rows = jnp.where((classes == DROPPED)[:, None], 0, rows)
        left_out = (classes[None] == own[:, None]) | (classes == DROPPED)[None]
        part = jax.nn.logsumexp(jnp.where(left_out, lowest, logits(x, rows)), axis=-1)
        return jnp.logaddexp(total, part), None

    total = vary_as(jnp.full(own.shape, lowest), x, rows, classes, own)
    return jax.lax.scan(add_block, total, (blocks, classes))[0]

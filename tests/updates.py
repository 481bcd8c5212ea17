"""One step of center_update on a bare table, as an optimizer takes it."""

from typing import Any

import optax

import centerloss_jax as clj


def move(centers, rows: Any, alpha=0.5) -> Any:
    """`(centers, state)` after the first step. Any, since optax's types do not know rows."""
    transform = clj.center_update(alpha)
    updates, state = transform.update(rows, transform.init(centers), centers)
    return optax.apply_updates(centers, updates), state

"""Choices by platform, and loops under vmap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def by_platform(*args: Any, cpu: Callable, default: Callable) -> Any:
    """Returns cpu(*args) in a program for CPUs and default(*args) in one for another platform.

    Every such choice of the library is made here, so that the tests can run both programs on a CPU.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@jax.custom_batching.custom_vmap
def max_over_vmapped_axis(number: Array) -> Array:
    """Returns `number`, reduced by max over a vmapped axis.

    A loop of as many steps for each table is then one loop. With a length for each, vmap would copy every table in
    every step of the loop.
    """
    return number


@max_over_vmapped_axis.def_vmap
def _max_over_vmapped_axis(axis_size, in_batched, number):
    del axis_size, in_batched
    return max_over_vmapped_axis(jnp.max(number)), False

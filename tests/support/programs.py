"""What a compiled program moves between devices and what memory it takes, and how many programs JAX compiles."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

MB = 1_000_000
# With JAX 0.10 the suite compiles by XLA's older emitters, which expand a scatter into a loop. Users do not.
AS_USERS: dict[str, str | bool] = {'xla_cpu_use_fusion_emitters': True} if jax.__version_info__ < (0, 11) else {}
SHAPE = re.compile(r'\w+\[([\d,]*)\]')
COLLECTIVE = re.compile(
    r'= (\([^=]*?\)|\S+) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
)


def shapes(*arrays) -> list[jax.ShapeDtypeStruct]:
    """Returns a ShapeDtypeStruct for each pair of a shape and a dtype."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


def memory(jitted, *arguments) -> Any:
    """Compiles a jitted function from shapes, without running it, and returns the compiler's memory analysis."""
    return jitted.lower(*arguments).compile(AS_USERS).memory_analysis()


def collective_sizes(compiled) -> list[int]:
    """Returns the number of elements that each collective of the program carries, in the order of its text."""
    return [
        int(np.prod([int(n) for n in dimensions.split(',') if n]))
        for shapes in COLLECTIVE.findall(compiled.as_text())
        for dimensions in SHAPE.findall(shapes)
    ]


def operations(compiled) -> Counter[str]:
    """Returns how often each operation of XLA is in a compiled program, inside fused and called computations too."""
    return Counter(
        re.findall(r'^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(', compiled.as_text(), re.MULTILINE)
    )


def collectives_in_loops(compiled) -> list[str]:
    """Returns the collectives outside of the program's entry, which a loop may run many times."""
    called, _ = compiled.as_text().split('\nENTRY ')
    return COLLECTIVE.findall(called)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for each program that JAX compiles, or loads from its cache on disk."""
    events = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        if event == '/jax/core/compile/backend_compile_duration':
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

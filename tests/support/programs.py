"""What a compiled program moves between devices, read from its text."""

import re

import numpy as np

SHAPE = re.compile(r'\w+\[([\d,]*)\]')
COLLECTIVE = re.compile(
    r'= (\([^=]*?\)|\S+) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
)


def collective_sizes(compiled):
    """The numbers of elements that the program's collectives carry, in the order of its text."""
    return [
        int(np.prod([int(n) for n in dimensions.split(',') if n]))
        for shapes in COLLECTIVE.findall(compiled.as_text())
        for dimensions in SHAPE.findall(shapes)
    ]


def collectives_in_loops(compiled):
    """Those that the program takes again and again: the ones outside its entry."""
    called, _ = compiled.as_text().split('\nENTRY ')
    return COLLECTIVE.findall(called)

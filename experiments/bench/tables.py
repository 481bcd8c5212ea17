"""The results of the benchmark as tables for a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Column, Table

OURS = 'centerloss_jax'


def timing_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Shows milliseconds of a step, half their interquartile range, and their ratio to our arm and to the copy.

    Without a ratio to the copy in any row, its column is left out.
    """
    with_copy = any(row['times_copy'] is not None for row in rows)
    names = 'ms', '±', 'x ours', *(['x copy'] if with_copy else []), 'MB'
    table = Table(
        'B', 'C', Column('arm', no_wrap=True), *(Column(name, justify='right') for name in names), title=title
    )
    our_seconds = _seconds_of_ours(rows)
    for row in rows:
        spread = f'{(row["high_seconds"] - row["low_seconds"]) / 2 / row["step_seconds"]:.0%}'
        temporary = '' if row['temporary_bytes'] is None else f'{row["temporary_bytes"] / 1e6:.1f}'
        ratio = row['step_seconds'] / our_seconds[_cell(row)]
        copies = [f'{row["times_copy"]:.1f}'] if with_copy else []
        numbers = f'{row["step_seconds"] * 1e3:.2f}', spread, f'{ratio:.2f}', *copies, temporary
        table.add_row(str(row['batch_size']), f'{row["num_classes"]:.0e}', row['arm'], *numbers)
    ratios = _torch_ratios(rows)
    if ratios:
        mean = math.exp(np.mean(np.log(ratios)))
        table.caption = (
            f'The fastest PyTorch arm takes {mean:.2f} times ours at B >= 4,096 (geometric mean of {len(ratios)} cells)'
        )
    return table


def toy_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shows milliseconds of a training step of the toy of this name, and their ratio to our arm."""
    title = f'training step of the {name}, B={rows[0]["batch_size"]}'
    table = Table(title, Column('ms', justify='right'), Column('x ours', justify='right'))
    our_seconds = _seconds_of_ours(rows)
    for row in rows:
        ratio = row['step_seconds'] / our_seconds[_cell(row)]
        table.add_row(row['arm'], f'{row["step_seconds"] * 1e3:.2f}', f'{ratio:.2f}')
    return table


def _torch_ratios(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Returns the time of the fastest PyTorch arm relative to ours in each cell with B >= 4,096."""
    our_seconds = _seconds_of_ours(rows)
    fastest: dict[tuple[int, int], float] = {}
    for row in rows:
        if row['arm'].startswith('torch') and row['batch_size'] >= 4096:
            fastest[_cell(row)] = min(row['step_seconds'], fastest.get(_cell(row), math.inf))
    return [seconds / our_seconds[cell] for cell, seconds in fastest.items()]


def _seconds_of_ours(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    return {_cell(row): row['step_seconds'] for row in rows if row['arm'] == OURS}


def _cell(row: Mapping[str, Any]) -> tuple[int, int]:
    return row['batch_size'], row['num_classes']

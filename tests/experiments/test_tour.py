"""Executes `experiments/tour.ipynb` and compares what it shows with the outputs that it was saved with."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / 'experiments' / 'tour.ipynb'


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def kinds_of_outputs(cell):
    """Returns the kinds of a cell's outputs in order. The kernel may send printed text in one piece or in several."""
    kinds = [sorted(output.get('data', {'text': ''})) for output in cell.outputs]
    return [kind for kind, _ in itertools.groupby(kinds)]


def ratios(notebook):
    printed = ''.join(output.get('text', '') for cell in code_cells(notebook) for output in cell.outputs)
    return [float(ratio) for ratio in re.findall(r'intra/inter ratio (\S+)', printed)]


def test_the_tour_is_saved_with_its_outputs():
    saved = nbformat.read(TOUR, as_version=4)
    assert [cell.execution_count for cell in code_cells(saved)] == list(range(1, len(code_cells(saved)) + 1))
    softmax, center = ratios(saved)
    assert center < softmax / 2


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_was_saved_with():
    saved, executed = nbformat.read(TOUR, as_version=4), nbformat.read(TOUR, as_version=4)
    for cell in code_cells(executed):
        cell.outputs = []
    client = NotebookClient(executed, timeout=600, resources={'metadata': {'path': str(TOUR.parent)}})
    client.execute()  # raises an error of a cell
    for before, after in zip(code_cells(saved), code_cells(executed), strict=True):
        assert kinds_of_outputs(after) == kinds_of_outputs(before)
    softmax, center = ratios(executed)
    assert center < softmax / 2

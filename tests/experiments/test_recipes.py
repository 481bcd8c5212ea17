"""Runs each file of `experiments/recipes` as `python -m` does, on eight devices, and checks what it claims."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'experiments' / 'recipes'

# For each number that a recipe prints last: the text before it, the least and the greatest value.
CLAIMS = {
    'loop': [
        (r'step 120, 8 devices: loss', 0, 1),
        (r'step 140, 1 devices: loss', 0, 1),
        (r'1 devices: .* test accuracy', 0.9, 1),
        (r'1 devices: .* ratio', 0, 0.3),
        (r'step_norm', 0.1, 10),
        (r'dropped', 0, 0),
    ],
    'class_means': [
        (r'loss:', 100, 1000),
        (r'zeros,', 0, 30),
        (r'step 0: .* ratio', 0.25, 1),
        (r'step 200: .* ratio', 0, 0.25),
    ],
    'two_tables': [(r'norms: digit', 0.1, 10), (r'parity', 0.9, 1), (r'center: digit', 0.9, 1)],
    'schedule_free': [(r'averaged parameters: test accuracy', 0.9, 1), (r'averaged .* ratio', 0, 0.2)],
    'freeze_backbone': [(r'step norm', 0.1, 10), (r'test accuracy', 0.88, 1)],
    'accumulate': [(r'whole batch', 0, 1e-4), (r'test accuracy', 0.9, 1)],
    'reid': [(r'pixels: .* mAP', 0, 0.8), (r'step 600: .* rank-1', 0.9, 1), (r'step 600: .* mAP', 0.85, 1)],
    'one_class': [
        (r'pixels: AUROC of unseen attacks', 0, 0.7),
        (r'a fixed center: AUROC of unseen attacks', 0.85, 1),
        (r'a moving center: AUROC of unseen attacks', 0.85, 1),
        (r'a fixed center, .* step norm', 0, 0),
        (r'a moving center, .* step norm', 1e-4, 10),
    ],
    'embedding': [(r'test accuracy', 0.85, 1), (r'share 0.01:', 0, 1e4), (r'by rows,', 0, 1e4)],
    'fixed_anchors': [
        (r'one-hot: .* AUROC of unknown classes', 0.88, 1),
        (r'simplex: .* AUROC of unknown classes', 0.88, 1),
        (r'simplex: accuracy of known classes', 0.94, 1),
    ],
}


def test_each_recipe_is_short_and_has_claims():
    paths = [path for path in FOLDER.glob('*.py') if path.stem != '__init__']
    assert {path.stem for path in paths} == CLAIMS.keys()
    for path in paths:
        assert len(path.read_text(encoding='utf-8').splitlines()) < 80, path


@pytest.mark.slow
@pytest.mark.usefixtures('all_optimizations')
@pytest.mark.parametrize('name', CLAIMS)
def test_a_recipe_does_what_it_claims(name, capsys):
    runpy.run_module(f'experiments.recipes.{name}', run_name='__main__')

    printed = capsys.readouterr().out
    for text, least, greatest in CLAIMS[name]:
        numbers = re.findall(rf'{text} ([\d.e+-]*\d)', printed)
        assert numbers, text
        assert least <= float(numbers[-1]) <= greatest, text

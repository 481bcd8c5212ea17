"""README.md and experiments/README.md: their code runs, their links lead somewhere, their numbers are right."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import centerloss_jax as clj

ROOT = Path(__file__).parents[1]
README, REFERENCE = (ROOT / name for name in ('README.md', 'experiments/README.md'))
TEXT = {page: page.read_text(encoding='utf-8') for page in (README, REFERENCE)}
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT[REFERENCE])
LINKS = [
    (page, link)
    for page, text in TEXT.items()
    for link in re.findall(r'\]\((?!https?:)([^)]+)\)|^\[\w+\]: (?!https?:)(.+)$', text, re.MULTILINE)
    for link in link
    if link
]


def headings(page):
    return re.findall(r'^#+ (.*)$', TEXT[page], re.MULTILINE)


def anchor(heading):
    """Returns the anchor that GitHub gives to a heading."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def heading_of(block):
    return re.findall(r'^#+ (.*)$', TEXT[REFERENCE].split(block)[0], re.MULTILINE)[-1]


@pytest.mark.slow
@pytest.mark.parametrize('block', BLOCKS, ids=heading_of)
def test_a_block_of_the_reference_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files to the current folder
    exec(compile(block, str(REFERENCE), 'exec'), {'__name__': 'block'})


def test_a_file_that_a_command_of_the_reference_reads_is_written_by_a_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if 'np.savez' in block]
    exec(compile(block, str(REFERENCE), 'exec'), {'__name__': 'block'})
    commands = re.findall(r'^python -m .*$', TEXT[REFERENCE], re.MULTILINE)
    read = {name for command in commands for name in re.findall(r'--(?:dataset|images) (\S+\.npz)', command)}
    assert read == {path.name for path in tmp_path.iterdir()} == {'table.npz', 'new.npz'}


def test_the_quickstart_of_readme_is_the_file_that_it_links():
    assert BLOCK.findall(TEXT[README]) == [(ROOT / 'experiments/quickstart/linen.py').read_text(encoding='utf-8')]


@pytest.mark.parametrize('folder', ['quickstart', 'recipes'])
def test_readme_links_every_file_that_is_meant_to_be_copied(folder):
    for path in (ROOT / 'experiments' / folder).glob('[!_]*.py'):
        assert f'](experiments/{folder}/{path.name})' in TEXT[README]


@pytest.mark.slow
def test_the_blocks_of_both_pages_pass_the_type_checker(tmp_path):
    blocks = [block for text in TEXT.values() for block in BLOCK.findall(text)]
    paths = [tmp_path / f'block_{number}.py' for number in range(len(blocks))]
    for path, block in zip(paths, blocks, strict=True):
        path.write_text(block, encoding='utf-8')
    command = [sys.executable, '-m', 'pyright', '--pythonpath', sys.executable, *map(str, paths)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert checked.returncode == 0, checked.stdout


def test_readme_is_short():
    lines = TEXT[README].splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    'command',
    [
        'python -m pip install -e ".[experiments]" && python -m experiments.toy2d',
        'python -m pip install -e ".[test]" && python -m pytest',
        'python -W error -m pdoc -d google --math -o api centerloss_jax',
    ],
)
def test_readme_has_the_command(command):
    assert command in TEXT[README]


@pytest.mark.parametrize(('page', 'link'), LINKS, ids=[f'{page.relative_to(ROOT)}-{link}' for page, link in LINKS])
def test_a_link_leads_somewhere(page, link):
    path, _, fragment = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if fragment:
        assert fragment in map(anchor, headings(target))


def test_the_index_of_the_reference_has_every_question():
    index = TEXT[REFERENCE].split('\n# ')[0]
    questions = [heading for heading in headings(REFERENCE) if heading.endswith(('?', 'step by step'))]
    assert len(questions) > 30
    assert re.findall(r'\]\(#([^)]+)\)', index) == [anchor(question) for question in questions]


def test_readme_links_each_public_name_to_the_file_that_defines_it():
    modules = {'linen': ['CenterLoss', 'SoftmaxLoss'], 'nnx': ['CenterLoss', 'Centers', 'SoftmaxLoss', 'Table']}
    names = [name for name in clj.__all__ if name not in modules]
    names += [f'{module}.{name}' for module, members in modules.items() for name in members]
    linked = dict(re.findall(r'^\| \[`([\w.]+)`\]\((centerloss_jax/\w+\.py)\) \|', TEXT[README], re.MULTILINE))
    assert sorted(linked) == sorted(names)
    for name, path in linked.items():
        member = clj
        for part in name.split('.'):
            member = getattr(member, part)
        assert (ROOT / path).samefile(inspect.getfile(member))


@pytest.mark.parametrize(
    ('origin', 'loss', 'weight'),
    [
        ('the paper, Caffe', lambda squares, d: squares.sum() / 2 / len(squares), lambda w, b, d: w / 2),
        ('PyTorch repositories', lambda squares, d: squares.mean(), lambda w, b, d: w),
        ('facenet', lambda squares, d: squares.mean() / d, lambda w, b, d: w / d),
        ('TF1 copies', lambda squares, d: squares.sum() / 2, lambda w, b, d: w * b / 2),
        ('re-ID strong baseline', lambda squares, d: squares.mean(), lambda w, b, d: w),
    ],
)
def test_the_table_of_factors_carries_a_weight_over(worked_example, origin, loss, weight):
    row = re.search(rf'^\| {origin} \|.*\| (.*) \|$', TEXT[README], re.MULTILINE)
    assert row is not None
    x, centers, labels = worked_example.x, worked_example.centers, worked_example.labels
    batch_size, num_features = x.shape
    written = row[1].split(';')[0].replace('λ', 'w').replace('·', '*').replace('B', 'b').replace('D', 'd')
    factor = eval(written, {'w': 0.25, 'b': batch_size, 'd': num_features})
    assert factor == weight(0.25, batch_size, num_features)
    theirs = 0.25 * loss(worked_example.per_example, num_features)
    np.testing.assert_allclose(factor * clj.center_loss(x, centers, labels), theirs, rtol=1e-6)


@pytest.mark.slow
def test_the_alpha_of_the_re_id_baseline_moves_centers_as_its_sgd_does():
    row = re.search(r'SGD of r = ([\d.]+) is . = (.+), ([\d.]+) at (\d+) x (\d+) \|$', TEXT[README], re.MULTILINE)
    assert row is not None
    rate, formula, written, num_classes, images_per_class = float(row[1]), row[2], row[3], int(row[4]), int(row[5])
    assert formula == '2 r (1 + n) / B'
    alpha = 2 * rate * (1 + images_per_class) / (num_classes * images_per_class)
    assert f'{alpha:.3f}' == written

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), images_per_class)
    x, centers = (rng.normal(size=(n, 3)).astype(np.float32) for n in (len(labels), num_classes))
    by_sgd = centers - rate * jax.grad(clj.center_loss, argnums=1)(x, centers, labels)
    tx = clj.center_update(alpha)
    updates, _ = tx.update(clj.center_rows(x, centers, labels), tx.init(centers), centers)
    by_eq_4: Any = optax.apply_updates(centers, updates)
    np.testing.assert_allclose(by_eq_4, by_sgd, rtol=1e-5, atol=1e-6)

"""The layout of the experiments: programs at the top, libraries in packages, and no name with two meanings."""

import ast
import collections
from pathlib import Path

import experiments

ROOT = Path(experiments.__file__).parent
PROGRAMS = sorted(path for path in ROOT.glob('*.py') if path.name != '__init__.py')
MODULES = sorted(ROOT.glob('*/*.py'))
PACKAGES = sorted({path.parent for path in MODULES})


def imported(path: Path) -> set[str]:
    """Returns the names of the modules that a file imports, and of what it imports from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names


def public_names(path: Path) -> set[str]:
    """Returns the public functions, classes and constants that a file defines."""
    names = set()
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {name for name in names if not name.startswith('_')}


def test_no_file_imports_a_program():
    programs = {f'experiments.{path.stem}' for path in PROGRAMS}
    assert len(programs) >= 7
    assert MODULES
    for path in (*PROGRAMS, *MODULES):
        assert not imported(path) & programs, path


def test_each_file_at_the_top_is_a_program_and_no_package_lies_deeper():
    for path in PROGRAMS:
        assert 'main' in public_names(path), path
        assert '__main__' in path.read_text(encoding='utf-8'), path
    assert not [*ROOT.glob('*/*/*.py')]


def test_a_package_has_at_most_a_dozen_files():
    for package in PACKAGES:
        files = [path for path in package.iterdir() if path.is_file()]
        assert 2 <= len(files) <= 12, package


def test_no_two_public_things_share_a_name():
    paths = [path for path in (*PROGRAMS, *MODULES) if path.parent.name not in ('quickstart', 'recipes')]
    names = collections.Counter(name for path in paths for name in public_names(path))
    # Each program has its own settings and main function. A quickstart or a recipe is a program on its own.
    assert {name for name, count in names.items() if count > 1} <= {'Config', 'main'}

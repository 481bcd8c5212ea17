"""The docstring of each public name has the sections that its page in the API reference needs."""

import inspect
from operator import attrgetter

import pytest

import centerloss_jax as clj

NAMES = [
    *(name for name in clj.__all__ if name not in ('linen', 'nnx')),
    *('ClassStatistics.merge', 'linen.CenterLoss', 'nnx.CenterLoss', 'nnx.Centers'),
]


@pytest.mark.parametrize('name', NAMES)
def test_a_public_docstring_has_a_summary_and_every_section(name):
    member = attrgetter(name)(clj)
    summary, blank, *lines = (inspect.getdoc(member) or '').splitlines()
    assert summary.endswith('.')
    assert not blank
    sections = {line[:-1] for line in lines if line.endswith(':') and line[:-1].isalpha()}
    assert 'Example' in sections
    if inspect.isclass(member):
        assert sections & {'Args', 'Attributes'}
    else:
        assert sections >= {'Args', 'Raises'}
        assert ('Returns' in sections) == (inspect.signature(member).return_annotation is not None)


# A page of pdoc in a window of 1280 pixels shows this many characters of a line of code.
SHOWN = {'function': 83, 'method': 79}


@pytest.mark.parametrize('name', NAMES)
def test_a_page_of_pdoc_shows_whole_lines_of_an_example(name):
    code = [line.strip() for line in (inspect.getdoc(attrgetter(name)(clj)) or '').splitlines() if '>>> ' in line]
    assert max(map(len, code)) <= SHOWN['method' if name == 'ClassStatistics.merge' else 'function']

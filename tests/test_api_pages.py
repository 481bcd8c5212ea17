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

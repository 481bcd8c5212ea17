"""Cases of a test that are much alike: some run by default, and the others with `-m slow`."""

from collections.abc import Mapping
from typing import Any

import pytest


def some_by_default(cases: Mapping[str, Any], *names: str) -> list[Any]:
    """Returns a parameter for each case, with its name as id. Those that are not named here are slow."""
    assert set(names) <= set(cases)
    return [
        pytest.param(
            *(case if type(case) is tuple else (case,)), id=name, marks=() if name in names else pytest.mark.slow
        )
        for name, case in cases.items()
    ]

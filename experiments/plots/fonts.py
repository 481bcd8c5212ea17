"""Fonts for names in any script: Matplotlib's own has no Chinese, for example, and draws boxes."""

import functools
import logging
from collections.abc import Iterable

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

# It would print which weight of a font it takes where there is no bold one.
logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)


def families_for(texts: Iterable[str]) -> list[str] | None:
    """Returns the font families that have all characters of some texts, regular and bold, or None if there are none."""
    usual = list(mpl.rcParams['font.family'])
    needed = {ord(character) for text in texts for character in text} - {ord('\n')}
    missing = needed - _characters(*usual)
    if not missing:
        return usual
    others = sorted({font.name for font in fontManager.ttflist if not font.name.startswith('Last Resort')})
    return next(([*usual, other] for other in others if missing <= _characters(other)), None)


def fitted(text: str) -> tuple[str, list[str]]:
    """Returns a text and the font families to draw it in. Where none has all characters, ? stands for the others."""
    families = families_for([text])
    if families is None:
        families = list(mpl.rcParams['font.family'])
        known = _characters(*families)
        text = ''.join(character if ord(character) in known or character == '\n' else '?' for character in text)
    return text, families


@functools.cache
def _characters(*families: str) -> frozenset[int]:
    """Returns the characters that a font has in both weights that are drawn."""
    paths = {findfont(FontProperties(family=list(families), weight=weight)) for weight in ('regular', 'bold')}
    return frozenset.intersection(*(frozenset(FT2Font(path).get_charmap()) for path in paths))

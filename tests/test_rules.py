"""Rules that hold for the source of the library."""

from pathlib import Path

import centerloss_jax as clj

XLA_TACTICS = ['platform_dependent', 'optimization_barrier', 'custom_jvp', 'custom_vjp', 'custom_vmap']
# A loss may state its own gradient beside its formula.
ALLOWED = {'_loss.py': {'custom_vjp'}, '_nearest.py': {'custom_vjp'}}


def test_xla_tactics_are_in_kernels_alone():
    sources = {path.name: path.read_text(encoding='utf-8') for path in Path(clj.__file__).parent.glob('*.py')}
    found = {name: {word for word in XLA_TACTICS if word in source} for name, source in sources.items()}
    assert {'platform_dependent', 'optimization_barrier'} <= found.pop('_kernels.py')
    assert not {name: words for name, words in found.items() if words - ALLOWED.get(name, set())}

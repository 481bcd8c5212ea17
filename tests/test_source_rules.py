"""Rules that hold for the source of the library."""

from pathlib import Path

import centerloss_jax as clj

XLA_TACTICS = ['platform_dependent', 'optimization_barrier', 'custom_jvp', 'custom_vjp', 'custom_vmap']


def test_xla_tactics_are_in_kernels_alone():
    library = Path(clj.__file__).parent
    sources = {path.name: path.read_text(encoding='utf-8') for path in library.glob('*.py')}
    found = {name: {word for word in XLA_TACTICS if word in source} for name, source in sources.items()}
    kernels = ''.join(path.read_text(encoding='utf-8') for path in library.glob('_kernels/*.py'))
    assert 'platform_dependent' in kernels
    assert not {name: words for name, words in found.items() if words}

"""What a run prints."""

from rich.console import Console

from experiments.launch import processes


def console() -> Console:
    """Returns a console that prints text as it is, brackets included. It is quiet on all processes but the first."""
    return Console(quiet=not processes.is_main_process(), markup=False, emoji=False)

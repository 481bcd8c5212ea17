"""The error for flags that cannot be used."""


class FlagError(Exception):
    """What is wrong with the flags, in one line. Not a ValueError, which tyro would print in a box."""

"""The error for flags that cannot be used."""


class FlagError(Exception):
    """Reports flags that cannot be used, in one line. It is not a ValueError, which tyro would print in a box."""

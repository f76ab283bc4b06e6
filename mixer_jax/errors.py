"""Exceptions that the doors turn into one line and an exit code."""


class UserError(ValueError):
    """A user's mistake, told in one line: the value, the rule it breaks, and the fix.

    The doors (`python -m mixer_jax.*`) print it without a stack trace and exit with code 2.
    """


class RunFailedError(RuntimeError):
    """A run that cannot go on though it was asked for rightly; exit code 1."""

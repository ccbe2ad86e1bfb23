"""The errors that a user can correct."""

from __future__ import annotations


# UserError is a ValueError, so `except ValueError` catches it too. Code that wraps a ValueError
# must let a finished message pass.
class UserError(ValueError):
    """An error that the user can correct.

    Its message is one line that says what was got, what was expected and what to do.
    """


class ConfigError(UserError):
    """A configuration key that is unknown, has a wrong type or contradicts another."""


class RunError(UserError):
    """An output folder that cannot be used."""


class ModelError(UserError):
    """A model, adapter or quantization that cannot be used."""

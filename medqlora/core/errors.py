"""Mistakes that a user can mend.

Every message is one line: what was got, what was expected, what to do.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what was got, what was expected, what
    to do.
    """


class ConfigError(UserError):
    """An unknown, ill-typed or contradictory configuration key."""


class RunError(UserError):
    """An output folder that cannot be used."""

"""The one error that the command line turns into a single clear line."""

from __future__ import annotations


class RoutevlError(ValueError):
    """Bad input, configuration or data. The message names the value, what was expected and where to set it."""


def first_line(error: Exception) -> str:
    """What a library's error says first."""
    return str(error).strip().partition("\n")[0]

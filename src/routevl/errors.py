"""The one error that the command line turns into a single clear line."""

from __future__ import annotations


class RoutevlError(ValueError):
    """Bad input, configuration or data. The message names the value, what was expected and where to set it."""

"""What processes that this package starts do not inherit of the machine's environment, which would change what they do."""

from __future__ import annotations

import os
from pathlib import Path

# options of every Java, of every `java` command, and of Oracle's
JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
# a cluster's module system puts its packages there: Python would import them before those of the environment
PYTHON_VARIABLES = ("PYTHONPATH",)


def variables_without(names: tuple[str, ...]) -> dict[str, str]:
    """This process's environment variables but for some."""
    return {name: value for name, value in os.environ.items() if name not in names}


def variables_for_snakemake() -> dict[str, str]:
    """This process's environment variables, with a folder for Snakemake's cache where that of the user cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/"), ".cache"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    return dict(os.environ) if writable else os.environ | {"XDG_CACHE_HOME": str(Path(".snakemake/cache").absolute())}

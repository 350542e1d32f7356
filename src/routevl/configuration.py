"""A configuration of the workflow against its schema."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from routevl.errors import RoutevlError
from routevl.options import parse_number

# 3.0 is an integer in JSON Schema, but not in Python and on a command line
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda checker, value: type(value) is int),
)


def check_schema(config: Any, schema: Mapping[str, Any], source: str) -> None:
    """Make numbers of what stands for numbers in a configuration, in place, and check it.

    YAML 1.1 reads `1e-3` as text, and a program may have written 3.0 for 3: where the schema wants a number, both are one.

    Raises:
        RoutevlError: it does not fit. One line, which begins with `source` and names the key.
    """
    validator = _Validator(schema)
    for error in [leaf for whole in validator.iter_errors(config) for leaf in _leaves(whole)]:
        if error.validator == "type" and error.validator_value in ("integer", "number"):
            number = _number(error.instance)
            if number is not None and validator.is_type(number, error.validator_value):
                *path, last = error.absolute_path
                section = config
                for name in path:
                    section = section[name]
                section[last] = number
    error = best_match(validator.iter_errors(config))
    if error is not None:
        key = ".".join(map(str, error.absolute_path)) or "top level"
        raise RoutevlError(f"{source}: {key}: {error.message}")


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """What is wrong in each of the alternatives of an error that has some."""
    if error.context:
        for below in error.context:
            yield from _leaves(below)
    else:
        yield error


def _number(value: Any) -> int | float | None:
    """The finite number that a text or a float is; a whole one as an integer."""
    if type(value) not in (str, float):
        return None
    try:
        number = parse_number(value if isinstance(value, str) else repr(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None

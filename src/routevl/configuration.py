"""A configuration of the workflow: its file, the one that it extends, and its schema."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from routevl.errors import RoutevlError, first_line
from routevl.options import parse_number

# 3.0 is an integer in JSON Schema, but not in Python and on a command line
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda checker, value: type(value) is int),
)


def read_configuration(path: str | Path) -> dict[str, Any]:
    """The configuration of a file, with what it extends. Raises RoutevlError where one of the files is none."""
    return extended(_read(path), str(path))


def extended(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A configuration with all that the file has which its key `extends` names; its own values win, within sections too.

    Raises:
        RoutevlError: that file, or one that it extends in its turn, cannot be read, or leads back.
    """
    files, merged = [source], dict(config)
    while "extends" in merged:
        name = merged.pop("extends")
        if type(name) is not str:
            raise RoutevlError(f"{files[-1]}: extends: {name!r} is no name of a file")
        if name in files:
            raise RoutevlError(f"{name}: extends itself")
        files.append(name)
        merged = _merged(_read(name), merged)
    return merged


def _read(path: str | Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RoutevlError(f"{path}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RoutevlError(f"{path}: not a readable YAML file ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise RoutevlError(f"{path}: not a configuration of the workflow")
    return config


def _merged(base: Any, own: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(own, Mapping)):
        return own
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in own.items()}}


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

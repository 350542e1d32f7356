"""Options: frozen dataclasses whose fields carry help and bounds. One way to read, check, describe and write them.

Methods, derivations of backbones and the settings of a run are all declared so. Free of torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields
from decimal import Decimal
from typing import Any, TypeVar, get_args, get_type_hints

from routevl.errors import RoutevlError

YES_NO = {"yes": True, "no": False}
NONE = "none"  # how None is written
TYPE_NAMES = {int: "integer", float: "number", bool: "yes or no", str: "text"}

Options = TypeVar("Options")


def option(
    help: str,
    default: Any = MISSING,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of an options dataclass: int, float, bool or str, or one of them with None.

    Args:
        help: what it means, for `--help` and the documents.
        choices: the values that a text may have.
        least, most: inclusive bounds of a number.
        above, below: exclusive bounds of a number.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, "choices": tuple(choices), **{name: bound for name, bound in bounds.items() if bound is not None}}
    return field(default=default, metadata=metadata)


def read(cls: type[Options], values: Mapping[str, Any], where: str) -> Options:
    """An instance of an options dataclass from values by name: typed already, or text as a command line or sheet has it.

    A class may have a method `conflicts`, which yields what is wrong with values that are right each by itself.

    Raises:
        RoutevlError: an unknown or missing option, a value of the wrong type or out of bounds, a conflict; one line
            that starts with `where`.
    """
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            raise RoutevlError(f"{where}: no option {name!r} (there {_are(names)})")
    for f in fields(cls):
        if f.default is MISSING and f.name not in values:
            raise RoutevlError(f"{where}: the option {f.name} is missing")
    hints = get_type_hints(cls)
    typed = {name: _typed(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    for f in fields(cls):
        if f.name in typed:
            _check(f.metadata, typed[f.name], f"{where}: {f.name}")
    options = cls(**typed)
    if hasattr(options, "conflicts") and (conflict := next(options.conflicts(), "")):
        raise RoutevlError(f"{where}: {conflict}")
    return options


def parse_number(text: str) -> int | float:
    """The number that a text is, as 12, 1e3, 3.0 or 1E-4; exact where it is whole, so that no id becomes another one.

    Raises:
        ValueError: it is none.
    """
    value = float(text)
    return int(Decimal(text)) if value.is_integer() else value


def check_value(cls: type, name: str, value: Any, where: str) -> None:
    """Raise RoutevlError where one option of the dataclass, typed or text, would be wrong."""
    f = next(f for f in fields(cls) if f.name == name)
    _check(f.metadata, _typed(get_type_hints(cls)[name], value, f"{where}: {name}"), f"{where}: {name}")


def _are(names: Sequence[str]) -> str:
    return f"are {', '.join(names)}" if names else "are none"


def _typed(hint: Any, value: Any, where: str) -> Any:
    kinds = get_args(hint) or (hint,)
    kind = kinds[0]
    if len(kinds) > 1 and (value is None or value == NONE):
        return None
    typed = value
    with suppress(KeyError, ValueError, OverflowError):
        if isinstance(value, str) and kind is not str:
            typed = YES_NO[value] if kind is bool else parse_number(value)
        if kind is float and type(typed) is int:
            typed = float(typed)
        elif kind is int and type(typed) is float and typed.is_integer():
            typed = int(typed)
    if type(typed) is not kind:
        raise RoutevlError(f"{where} is {value!r}, expected {_expected(hint)}")
    return typed


def _expected(hint: Any) -> str:
    kinds = get_args(hint) or (hint,)
    return TYPE_NAMES[kinds[0]] + (f" or {NONE}" if len(kinds) > 1 else "")


def _check(metadata: Mapping[str, Any], value: Any, where: str) -> None:
    """Raise RoutevlError where a typed value is out of its bounds."""
    if value is None:
        return
    if metadata.get("choices") and value not in metadata["choices"]:
        raise RoutevlError(f"{where} is {value!r}, expected one of {', '.join(metadata['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RoutevlError(f"{where} is {value}, expected a finite number")
    within = {
        "least": ("{} or more", lambda bound: value >= bound),
        "most": ("{} or less", lambda bound: value <= bound),
        "above": ("more than {}", lambda bound: value > bound),
        "below": ("less than {}", lambda bound: value < bound),
    }
    for name, (words, holds) in within.items():
        if name in metadata and not holds(metadata[name]):
            raise RoutevlError(f"{where} is {value}, expected {words.format(metadata[name])}")


def read_words(words: Iterable[str], where: str) -> dict[str, str]:
    """Words `key=value`, as a run sheet and the command line have them, as a mapping.

    Raises:
        RoutevlError: a word without `=`, or a key given twice.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals or not value:
            raise RoutevlError(f"{where}: {word!r} is not of the form key=value")
        if key in values:
            raise RoutevlError(f"{where}: {key} is given twice")
        values[key] = value
    return values


def text_of(value: Any) -> str:
    """A value as `read` understands it."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def words_of(values: Mapping[str, Any]) -> list[str]:
    """The inverse of `read_words`."""
    return [f"{key}={text_of(value)}" for key, value in values.items()]


def describe(cls: type, but: Iterable[str] = ()) -> list[dict[str, Any]]:
    """What documents and `routevl methods --json` say of each option: name, type, default, help, choices and bounds.

    A required option has no `default`.
    """
    hints = get_type_hints(cls)
    entries = []
    for f in fields(cls):
        if f.name in set(but):
            continue
        entry = {"name": f.name, "type": _expected(hints[f.name]), "help": f.metadata["help"]}
        if f.default is not MISSING:
            entry["default"] = f.default
        entry |= {name: list(v) if name == "choices" else v for name, v in f.metadata.items() if name != "help" and v != ()}
        entries.append(entry)
    return entries


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """The type of an argparse option: an integer (or a float, by `kind`), `least` or more."""

    def parse(text: str) -> Any:
        try:
            value = _typed(kind, text, "")
        except RoutevlError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no {TYPE_NAMES[kind]} of {least} or more")
        return value

    return parse


def add_checkpoint_every(parser: argparse.ArgumentParser) -> None:
    """The option of every stage that writes checkpoints of training steps."""
    parser.add_argument("--checkpoint-every", type=at_least(1), default=200, metavar="STEPS", help="steps between checkpoints")


def of_each_run(arguments: argparse.Namespace, *kinds: str) -> list[argparse.Namespace]:
    """The arguments of each run of a stage that takes several, one after another: of the options `kinds`, which have one value
    for each run, its own. What a run writes goes where the first of them that is no seed says.

    Raises:
        RoutevlError: the options have not equally many values, or two runs write to one place.
    """
    values = {kind: getattr(arguments, kind) for kind in kinds}
    if len({len(of_kind) for of_kind in values.values()}) > 1:
        raise RoutevlError(", ".join(f"{len(of_kind)} --{kind}" for kind, of_kind in values.items()) + ": one for each run")
    place = next(kind for kind in kinds if kind != "seed")
    if len(set(values[place])) < len(values[place]):
        raise RoutevlError(f"--{place} {' '.join(values[place])}: each run needs one of its own")
    each = (dict(zip(values, of_run, strict=True)) for of_run in zip(*values.values(), strict=True))
    return [argparse.Namespace(**(vars(arguments) | of_run)) for of_run in each]

"""Stage `derive-backbone`: a model folder in, a model folder out."""

from __future__ import annotations

import argparse
import importlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routevl.backbones.derivations import DERIVATIONS, check_joined, read_options
from routevl.backbones.folder import DERIVED, check_folder, fingerprint_of, origin_of
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, write_json
from routevl.options import add_checkpoint_every, at_least, read_words


@dataclass(frozen=True)
class Execution:
    """How a derivation trains, which changes no result but in the last bits.

    Attributes:
        checkpoint: folder of the state of an unfinished derivation; resumed from when there.
        checkpoint_every: steps between checkpoints.
        threads: of the CPU.
        workers: processes that decode images; 0: this one does.
    """

    checkpoint: Path
    checkpoint_every: int
    threads: int
    workers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl derive-backbone`."""
    parser.add_argument("--by", required=True, help=f"how: {', '.join(DERIVATIONS)}")
    parser.add_argument("--source", required=True, metavar="FOLDER", help="the backbone that it is made of")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data (routevl prepare), for a derivation that calibrates")
    parser.add_argument("--vision-backbone", metavar="FOLDER", help="another one, for a derivation that joins it to the source")
    parser.add_argument(
        "--checkpoint", metavar="FOLDER", help="state of an unfinished derivation that trains; resumed from when there"
    )
    add_checkpoint_every(parser)
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads of a derivation that trains")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that decode its images; 0: this one does")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of the derivation")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the new backbone's folder")


def run(arguments: argparse.Namespace) -> None:
    """Derive a backbone. Its folder also gets derived.json: how, from which weights, and what the derivation says of the result;
    of a source that is from the hub, or derived itself, also where that comes from (`Origin`).

    Raises:
        RoutevlError: not a backbone, an unknown derivation, or a wrong option; data, a vision backbone or a
            checkpoint that are missing or too much.
        SystemExit: with `exit_status`, after a stop signal, where the derivation trains; the checkpoint is then on disk.
    """
    options = read_options(arguments.by, read_words(arguments.options, "--options"), "--options")
    source, row = check_folder(arguments.source), DERIVATIONS[arguments.by]
    data = _needed(arguments, "data", row.calibrates, ("calibrates with prepared data", "reads no data"))
    checkpoint = _needed(arguments, "checkpoint", row.trains, ("trains", "does not train"))
    check_joined(arguments.by, arguments.vision_backbone, "--vision-backbone")
    more: list[Any] = [Path(data)] if row.calibrates else []
    more += [check_folder(arguments.vision_backbone)] if row.joins else []
    with ExitStack() as stack:
        if row.trains:
            from accelerate import PartialState

            from routevl.training.checkpoint import forget, held

            more.append(Execution(Path(checkpoint), arguments.checkpoint_every, arguments.threads, arguments.workers))
            stack.enter_context(held(Path(checkpoint), PartialState()))
        module, _, function = row.implementation.partition(":")
        derive = getattr(importlib.import_module(f"routevl.backbones.{module}"), function)
        with atomic_folder(arguments.output, "config.json") as folder:
            found = derive(source, options, Path(folder), *more)
            record = {"by": arguments.by, "options": asdict(options), "source_fingerprint": fingerprint_of(source), **found}
            origin = origin_of(source)
            if origin.hub_id or origin.derivations:
                record["source"] = asdict(origin)
            write_json(folder / DERIVED, record)
        if row.trains:
            forget(Path(checkpoint))
    print(f"derive-backbone: {', '.join(f'{name} {value}' for name, value in found.items())}")


def _needed(arguments: argparse.Namespace, name: str, needed: bool, what: tuple[str, str]) -> str | None:
    """An argument that some derivations need. Raises RoutevlError where it is missing, or there for another one."""
    value = getattr(arguments, name)
    if needed != (value is not None):
        needs = f"{what[0]}, and --{name} is missing" if needed else f"{what[1]}: drop --{name}"
        raise RoutevlError(f"--by {arguments.by}: the derivation {needs}")
    return value

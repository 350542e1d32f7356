"""Stage `derive-backbone`: a model folder in, a model folder out."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path

from routevl.backbones.derivations import DERIVATIONS, read_options
from routevl.backbones.folder import DERIVED, check_folder, fingerprint_of, origin_of
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, write_json
from routevl.options import read_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl derive-backbone`."""
    parser.add_argument("--by", required=True, help=f"how: {', '.join(DERIVATIONS)}")
    parser.add_argument("--source", required=True, metavar="FOLDER", help="the backbone that it is made of")
    parser.add_argument("--data", metavar="FOLDER", help="prepared data (routevl prepare), for a derivation that calibrates")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of the derivation")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the new backbone's folder")


def run(arguments: argparse.Namespace) -> None:
    """Derive a backbone. Its folder also gets derived.json: how, from which weights, and what the derivation says of the result;
    of a source that is from the hub, or derived itself, also where that comes from (`Origin`).

    Raises:
        RoutevlError: not a backbone, an unknown derivation, or a wrong option; data that are missing or too much.
    """
    options = read_options(arguments.by, read_words(arguments.options, "--options"), "--options")
    source, row = check_folder(arguments.source), DERIVATIONS[arguments.by]
    if row.calibrates != (arguments.data is not None):
        needs = "calibrates with prepared data, and --data is missing" if row.calibrates else "reads no data: drop --data"
        raise RoutevlError(f"--by {arguments.by}: the derivation {needs}")
    data = (Path(arguments.data),) if row.calibrates else ()
    module, _, function = row.implementation.partition(":")
    derive = getattr(importlib.import_module(f"routevl.backbones.{module}"), function)
    with atomic_folder(arguments.output, "config.json") as folder:
        found = derive(source, options, Path(folder), *data)
        record = {"by": arguments.by, "options": asdict(options), "source_fingerprint": fingerprint_of(source), **found}
        origin = origin_of(source)
        if origin.hub_id or origin.derivations:
            record["source"] = asdict(origin)
        write_json(folder / DERIVED, record)
    print(f"derive-backbone: {', '.join(f'{name} {value}' for name, value in found.items())}")

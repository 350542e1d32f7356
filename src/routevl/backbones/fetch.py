"""Stage `fetch-backbone`: a model of the Hugging Face hub, pinned by a revision, as a folder."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from routevl.backbones.folder import SOURCE, check_folder
from routevl.errors import RoutevlError
from routevl.files import atomic_folder, sha256_of, write_json

SHA256 = re.compile(r"[0-9a-f]{64}")
# *.model: sentencepiece's vocabulary, where there is no tokenizer.json; the model card names the licence
SMALL_FILES = ["*.json", "*.txt", "*.model", "README.md"]
FILES_OF_A_BACKBONE = [*SMALL_FILES, "*.safetensors"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl fetch-backbone`."""
    parser.add_argument("--hub-id", required=True, metavar="OWNER/NAME", help="a model of the Hugging Face hub")
    parser.add_argument("--revision", required=True, help="commit, tag or branch")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where its files go")


def run(arguments: argparse.Namespace) -> None:
    """Put a hub model's files into a folder, from the local cache (HF_HOME) where it has them, else from the hub.

    The folder also gets source.json: the hub id, the commit that the revision stands for, and the sha256 of every file.

    Raises:
        RoutevlError: not a hub id; not on the hub; not in the local cache when offline; no config.json or no safetensors weights;
            or a file that is not what the hub published.
    """
    snapshot = check_folder(hub_snapshot(arguments.hub_id, arguments.revision))
    with atomic_folder(arguments.output, "config.json") as folder:
        hashes = {}
        for file in sorted(snapshot.iterdir()):
            hashes[file.name] = sha256_of(shutil.copyfile(file, folder / file.name))
            published = file.resolve().name  # the cache names large files by the sha256 that the hub gives
            if SHA256.fullmatch(published) and published != hashes[file.name]:
                raise RoutevlError(f"{file}: its sha256 is {hashes[file.name]}, not the published {published}; delete it")
        write_json(folder / SOURCE, {"hub_id": arguments.hub_id, "commit": snapshot.name, "sha256": hashes})


def hub_snapshot(hub_id: str, revision: str, patterns: list[str] = FILES_OF_A_BACKBONE) -> Path:
    """The folder of a hub model's files in the local cache, downloaded where they are not there. Raises RoutevlError as `run`."""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise RoutevlError(f"backbone {hub_id}: no such folder, and not a Hugging Face hub id (owner/name)") from None
    except RevisionNotFoundError:
        raise RoutevlError(f"backbone {hub_id}: the Hugging Face hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise RoutevlError(f"backbone {hub_id}: no such folder, and not a (public) model on the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        raise RoutevlError(
            f"backbone {hub_id} at revision {revision}: no such folder, and the Hugging Face hub cannot be reached and "
            "the local cache does not hold it; download it on a machine with internet and set the backbone's "
            "path to that folder, or HF_HOME to a cache that holds it"
        ) from None
    except OSError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RoutevlError(f"backbone {hub_id} at revision {revision}: not downloaded ({first_line})") from None

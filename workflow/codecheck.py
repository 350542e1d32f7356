"""Write codecheck.yml: the tables and figures that a CODECHECK would make again, in the community's format 1.0
(https://codecheck.org.uk/spec/config/1.0/).

usage: python workflow/codecheck.py RESULTS

What is null is to be filled in by hand, and stays when the file is written again.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from routevl.errors import RoutevlError
from routevl.files import atomic_file
from routevl.provenance.manifest import describe, read_manifest
from routevl.provenance.records import read_plan

SPECIFICATION = "https://codecheck.org.uk/spec/config/1.0/"
OUTPUT = Path("codecheck.yml")
SUFFIXES = {"table": ".csv", "figure": ".pdf"}  # which form of an output is listed, by the rule that makes it
HEADER = "# Written by `make codecheck`. Fill in what is null: `repository` by the authors, the rest by the codechecker.\n"
TO_BE_FILLED_IN = {
    "repository": None,
    "codechecker": [{"name": None, "ORCID": None}],
    "report": None,
    "summary": None,
    "check_time": None,
    "certificate": None,
}


def reproduced(results: Path) -> list[dict[str, str]]:
    """`file` and `comment` of every table and figure of the configuration.

    Raises:
        RoutevlError: one has not been made yet, is not as its job wrote it, or lies outside of the project.
    """
    entries = []
    for path in sorted(job.manifest for job in read_plan(results).values()):
        if path.parent.name not in SUFFIXES:
            continue
        manifest = read_manifest(path)
        [output] = [entry for entry in manifest["outputs"] if entry["path"].endswith(SUFFIXES[manifest["rule"]])]
        if Path(output["path"]).is_absolute():
            raise RoutevlError(f"{output['path']}: {OUTPUT} can only name files by their path in the project")
        if describe(Path(output["path"]))["sha256"] != output["sha256"]:
            raise RoutevlError(f"{output['path']}: was changed after it had been made")
        entries.append({"file": output["path"], "comment": comment(manifest["wildcards"]["name"])})
    return entries


def comment(name: str) -> str:
    """The first sentence of a table's or figure's caption, without markup."""
    caption = " ".join(Path(f"workflow/report/{name}.rst").read_text(encoding="utf-8").split())
    return f"{name}: " + re.sub(r"[*`]", "", re.split(r"(?<=\.) ", caption)[0])


def paper() -> dict[str, Any]:
    """The paper, from CITATION.cff."""
    citation = yaml.safe_load(Path("CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    authors = [
        {"name": f"{author['given-names']} {author['family-names']}", "ORCID": author["orcid"].rsplit("/", 1)[1]}
        for author in citation["authors"]
    ]
    return {"title": citation["title"], "authors": authors, "reference": f"https://doi.org/{citation['doi']}"}


def main() -> int:
    """Returns 2 where there is nothing to be checked yet."""
    [results] = map(Path, sys.argv[1:])
    before = yaml.safe_load(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.exists() else {}
    try:
        content = {
            "version": SPECIFICATION,
            "manifest": reproduced(results),
            "paper": paper(),
            "source": "Code, configuration and the addresses of all data are in this repository; its workflow makes every file, "
            f"and {os.path.relpath(results)}/manifests tells by which command and from which inputs.",
            **{key: before.get(key, empty) for key, empty in TO_BE_FILLED_IN.items()},
        }
        text = yaml.safe_dump(content, version=(1, 1), sort_keys=False, allow_unicode=True, width=120)
        with atomic_file(OUTPUT) as temporary:
            temporary.write_text(HEADER + text, encoding="utf-8")
    except RoutevlError as error:
        print(f"codecheck: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

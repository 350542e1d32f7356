"""Stage `provenance`: a page for reviewers that says what made the results: configuration, runs, jobs and where they ran."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from routevl.errors import RoutevlError
from routevl.files import atomic_file
from routevl.provenance.manifest import Manifest
from routevl.provenance.records import Records
from routevl.reporting.formats import html_page, markdown_table
from routevl.reporting.names import plural

TITLE = "What made the results"
SHA256_SHOWN = 12  # of 64 hexadecimal digits; the manifests have all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `routevl provenance`."""
    parser.add_argument("--results", required=True, type=Path, metavar="FOLDER", help="results folder with its manifests")
    parser.add_argument("--configuration", required=True, metavar="JSON", help="the workflow's whole configuration")
    parser.add_argument("--experiments", required=True, type=Path, metavar="TSV", help="experiments sheet")
    parser.add_argument("--output", required=True, type=Path, metavar="HTML", help="the page")


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    records = Records(arguments.results)
    broken = [job.error for job in records.jobs if job.error]
    try:
        configuration = json.loads(arguments.configuration)
    except ValueError as error:
        raise RoutevlError(f"--configuration is not JSON: {error}") from None
    text = _page(lineage(records), broken, configuration, arguments.experiments)
    with atomic_file(arguments.output) as temporary:
        temporary.write_text(html_page(TITLE, text), encoding="utf-8")


def lineage(records: Records) -> list[Manifest]:
    """The manifests of all jobs that tables and figures come from, in the order in which they started."""
    waiting = [job for job in records.jobs if job.path.parent.name in ("table", "figure")]
    found: dict[Path, Manifest] = {}
    while waiting:
        job = waiting.pop()
        if job.manifest and job.path not in found:
            found[job.path] = job.manifest
            waiting += filter(None, (records.maker_of(entry["path"]) for entry in job.manifest["inputs"]))
    return sorted(found.values(), key=lambda manifest: manifest["started"])


def _page(manifests: Sequence[Manifest], broken: Sequence[str], configuration: Any, experiments: Path) -> str:
    hours = sum(manifest["wall_seconds"] for manifest in manifests) / 3600
    parts = [
        f"# {TITLE}",
        "Every job leaves a manifest with its exact command and the sha256 of all that it read and wrote, "
        "`manifests/<rule>/<job>.json` in the folder of results. This page sums them up; `routevl audit` says whether they "
        "still agree with what is on the disk, and makes any output again.",
        *(f"**Not readable:** {error}" for error in broken),
        "## Code, environment and machines",
        _table(["", "", "Jobs"], _circumstances(manifests)),
        "## Jobs",
        f"{plural(len(manifests), 'job')} that the tables and figures come from, {hours:.2f} hours in all:",
        _table(["Rule", "Job", "Started (UTC)", "Seconds", "Peak memory (MB)", "Output", "sha256"], map(_job_row, manifests)),
        "## Runs",
        f"The run sheet, `{experiments}`:",
        markdown_table(pd.read_csv(experiments, sep="\t", dtype=str, keep_default_na=False), tablefmt="github"),
        "## Configuration",
        f"```yaml\n{yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True, width=120)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_table(pd.DataFrame(rows, columns=header), tablefmt="github")


def _circumstances(manifests: Sequence[Manifest]) -> list[list[str]]:
    """Each commit, Python, lock and machine that occurs, with the number of its jobs."""
    found: Counter[tuple[str, str]] = Counter()
    for manifest in manifests:
        code, environment, machine = manifest["code"], manifest["environment"], manifest["machine"]
        changed = " with uncommitted changes" if code["dirty"] else ""
        gpus = ", ".join(machine["gpus"]) or "no GPU"
        found["Code", f"routevl {code['version']}, commit {code['commit'] or 'unknown'}{changed}"] += 1
        found["Python", environment["python"]] += 1
        found["Lock file's sha256", environment["lock"] or "none"] += 1
        found["Machine", f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, {gpus}, {machine['system']}"] += 1
    return [[what, value, str(count)] for (what, value), count in sorted(found.items())]


def _job_row(manifest: Manifest) -> list[str]:
    outputs = manifest["outputs"]
    return [
        manifest["rule"],
        " ".join(manifest["wildcards"].values()),
        f"{datetime.fromisoformat(manifest['started']):%Y-%m-%d %H:%M:%S}",
        f"{manifest['wall_seconds']:.1f}",
        f"{manifest['peak_memory_mb']:.0f}",
        " ".join(f"`{entry['path']}`" for entry in outputs),
        " ".join(f"`{entry['sha256'][:SHA256_SHOWN]}`" for entry in outputs),
    ]

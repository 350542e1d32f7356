"""Run `snakemake --lint`; fail on every finding but the one with a reason against it.

usage: python workflow/lint.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# One environment runs Snakemake and all its jobs, pinned with hashes in envs/: a second one per rule could only differ from it.
ACCEPTED = "Specify a conda environment or container for each rule."


def main() -> int:
    """Returns 1 when there is a finding, or Snakemake could not read the workflow."""
    snakemake = str(Path(sys.executable).with_name("snakemake"))
    lint = subprocess.run([snakemake, "--lint"], capture_output=True, text=True)
    output = lint.stdout + lint.stderr
    found = [line.strip() for line in output.splitlines() if line.startswith("    * ")]
    if not found and lint.returncode or any(ACCEPTED not in line for line in found):
        print(output)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

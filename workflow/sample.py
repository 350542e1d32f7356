"""Run the workflow on a folder of photographs, as `make sample` does.

usage: python workflow/sample.py DATA --cores N --roberta FOLDER --gpt2 FOLDER --vit FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUN = [sys.executable, "workflow/run.py"]
MADE_BY_THE_DEMO = Path("results/backbones")


def main() -> int:
    """Returns Snakemake's exit status; 2 where DATA is no folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="its layout is described in config/sample.yaml")
    parser.add_argument("--cores", required=True, help="jobs side by side")
    for name in ("roberta", "gpt2", "vit"):
        parser.add_argument(f"--{name}", required=True, metavar="FOLDER", help="backbone; one of the demo's own is made first")
    arguments = parser.parse_args()
    data, text, vision = arguments.data, {"roberta": arguments.roberta, "gpt2": arguments.gpt2}, {"vit": arguments.vit}
    if not Path(data).is_dir():
        print(f"sample: error: DATA={data!r} is not a folder; see config/sample.yaml for what it holds", file=sys.stderr)
        return 2
    demos = [folder for folder in (text | vision).values() if Path(folder).parent == MADE_BY_THE_DEMO]
    if demos and (status := subprocess.run([*RUN, "results", "--cores", arguments.cores, "--only", *demos]).returncode):
        return status
    given = {
        "data": {"root": data, "vocabulary": f"{data}/vqav2/trainval_ans2label.json"},
        "backbones": {
            "text": {name: {"path": path} for name, path in text.items()},
            "vision": {name: {"path": path} for name, path in vision.items()},
        },
    }
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    options = ["--cores", arguments.cores, "--configfile", "config/sample.yaml", "--config", *words]
    return subprocess.run([*RUN, "results/sample", *options]).returncode


if __name__ == "__main__":
    sys.exit(main())

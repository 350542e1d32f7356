# Configuration and run sheet, validated before anything else; and how a run's settings become options.
import json
import sys
from pathlib import Path

import pandas as pd
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

import routevl
from routevl.reporting.figures import FIGURES
from routevl.reporting.tables import TABLES
from routevl.routing import ROUTING
from routevl.startup import log_startup


def check_schema(value, schema, source):
    """Stop with one line, which names the key and what is wrong with it, where `value` does not fit the schema."""
    schema = yaml.safe_load((Path(workflow.current_basedir) / "../schemas" / schema).read_text())
    error = best_match(Draft202012Validator(schema).iter_errors(value))
    if error is not None:
        key = ".".join(map(str, error.absolute_path)) or "top level"
        raise WorkflowError(f"{source}: {key}: {error.message}")


check_schema(config, "config.schema.yaml", "configuration")
R = config["results"]
METHODS = [path.parent.name for path in sorted(Path(routevl.__file__).parent.glob("methods/*/config.py"))]
if not Path(config["experiments"]).is_file():
    raise WorkflowError(f"{config['experiments']}: no such run sheet (config key experiments)")
EXPERIMENTS = pd.read_csv(config["experiments"], sep="\t", dtype=str, keep_default_na=False).to_dict("records")
for row in EXPERIMENTS:
    check_schema(row, "experiments.schema.yaml", f"{config['experiments']}: experiment {row.get('experiment')!r}")
    if [other["experiment"] for other in EXPERIMENTS].count(row["experiment"]) > 1:
        raise WorkflowError(f"{config['experiments']}: two rows have the experiment name {row['experiment']!r}")

# `routevl` of the environment that runs Snakemake, also where that was not activated
shell.prefix(f'export PATH="{Path(sys.executable).parent}:$PATH"; set -euo pipefail; ')

RUNS = {f"{row['experiment']}_seed{seed}": {**row, "seed": seed} for row in EXPERIMENTS for seed in row["seeds"].split(",")}


wildcard_constraints:
    run="|".join(RUNS),
    shard=r"\d{5}",


def runs_feeding(name):
    """The runs that feed a table or figure, by its short name: F2_main is fed by rows whose `feeds` has F2."""
    short = name.split("_")[0]
    return [run for run, row in RUNS.items() if short in row["feeds"].split(",")]


def targets(names, endings):
    """The files of those tables or figures that some experiment feeds; F1 is drawn from the method alone."""
    fed = [name for name in names if name == "F1_method" or runs_feeding(name)]
    return [f"{name}.{ending}" for name in fed for ending in endings]


def backbone_path(modality, name):
    """Where a backbone is: the folder of its pretraining rule, a folder on disk, or a hub id."""
    entry = config["backbones"][modality][name]
    return f"{R}/backbones/{name}" if "pretrain" in entry else entry["path"]


def backbone_files(modality, name):
    """The backbone as a rule's input: none where it is a hub id, which is pinned by its revision."""
    entry, path = config["backbones"][modality][name], backbone_path(modality, name)
    return [path] if "pretrain" in entry or Path(path).is_dir() else []


def option(name, value):
    """One option of the command line, quoted; nothing where the value is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return f"--{name.replace('_', '-')} {json.dumps(value) if isinstance(value, str) and ' ' in value else value}"


def options(values):
    """Options from a mapping, in its order."""
    return " ".join(filter(None, (option(name, value) for name, value in values.items())))


def run_settings(wildcards):
    """A run's settings: its row of the sheet, its task's part of the configuration, and what all runs share."""
    row = RUNS[wildcards.run]
    columns = [
        "task",
        "method",
        "routing",
        "rank",
        "alpha",
        "prefix",
        "visual_tokens",
        "epochs",
    ]
    settings = {column: row[column] for column in columns}
    return options(
        {
            **settings,
            **config["tasks"][row["task"]],
            **config["runs"],
            "seed": row["seed"],
        }
    )


def backbone_options(wildcards):
    """The backbones of a run, as options."""
    row = RUNS[wildcards.run]
    values = {}
    for modality in ("text", "vision"):
        name = row[f"{modality}_backbone"]
        values[f"{modality}_backbone"] = backbone_path(modality, name)
        values[f"{modality}_revision"] = config["backbones"][modality][name].get("revision")
    return options(values)


SOURCE_FILES = ("images", "questions", "annotations", "captions")


def sources():
    """The sources of the data, with their paths under the data's root."""
    root = Path(config["data"]["root"])
    return [
        {key: str(root / value) if key in SOURCE_FILES else value for key, value in source.items()}
        for source in config["data"]["sources"]
    ]


def source_files(wildcards):
    """The files and folders that the sources name; the demo world's count as its rule's output."""
    if "world" in config:
        return [f"{R}/world"]
    return [source[name] for source in sources() for name in SOURCE_FILES if name in source]


def shard_names():
    n = config["features"]["shards"]
    return [f"shard-{shard:05d}-of-{n:05d}.safetensors" for shard in range(n)]


def scoring_batches():
    """(task, number, runs) of each scoring job, in the order of the run sheet."""
    size = config["scoring"]["runs_per_job"]
    for task in config["tasks"]:
        runs = [run for run, row in RUNS.items() if row["task"] == task]
        yield from ((task, start // size, runs[start : start + size]) for start in range(0, len(runs), size))


def results_of_runs(wildcards):
    """What a table or figure reads of its runs."""
    runs = runs_feeding(wildcards.name)
    return [f"{R}/{kind}/{run}" for run in runs for kind in ("models", "predictions", "scores")]


def check_choice(row, column, choices):
    """Stop where a row of the run sheet names something that does not exist."""
    if row[column] not in choices:
        raise WorkflowError(
            f"{config['experiments']}: {column} {row[column]!r} of experiment {row['experiment']!r} is not one of {', '.join(choices)}"
        )


for row in RUNS.values():
    check_choice(row, "method", METHODS)
    check_choice(row, "routing", ROUTING)
    check_choice(row, "task", config["tasks"])
    check_choice(row, "text_backbone", config["backbones"]["text"])
    check_choice(row, "vision_backbone", config["backbones"]["vision"])
    check_choice(row, "visual_tokens", config["features"]["tokens"])

# Configuration and run sheet, validated before anything else; and how a run's settings become options.
import copy
import json
import math
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from routevl import options as command_line_options
from routevl import slurm
from routevl.backbones.derivations import DERIVATIONS, check_backbones
from routevl.configuration import check_schema, extended
from routevl.data.datasets import read_datasets
from routevl.data.sources import SOURCE_FILES, parse_sources
from routevl.errors import RoutevlError
from routevl.files import read_json, sha256_of, write_json
from routevl.methods.table import method_class
from routevl.provenance.manifest import digest_of
from routevl.provenance.record import LOCK
from routevl.provenance.records import program
from routevl.rehearsal import rehearsed, rehearsed_sheet
from routevl.reporting import FIGURES, TABLES
from routevl.sheet import check, read_sheet, runs_of, settings_of, trials_of
from routevl.startup import log_startup


def configured_paths():
    """(key, path) of each path that the configuration names."""
    data, backbones = config["data"], config["backbones"]
    yield from ((key, config[key]) for key in ("results", "experiments"))
    yield from ((f"data.{key}", data[key]) for key in ("root", "downloads", "vocabulary") if key in data)
    for number, source in enumerate(data["sources"]):
        entries = source | (source["split"] if isinstance(source["split"], dict) else {})
        yield from ((f"data.sources.{number}.{key}", entries[key]) for key in (*SOURCE_FILES, "karpathy") if key in entries)
    for modality, entries in backbones.items():
        yield from ((f"backbones.{modality}.{name}.path", entry["path"]) for name, entry in entries.items() if "path" in entry)


def check_paths():
    """Stop with one line where a path cannot be carried by Snakemake, a shell or a command line; all others are quoted."""
    for key, path in configured_paths():
        if not path.isprintable() or path.strip() != path or path[:1] in ("", "-", "~") or {"{", "}"} & set(path):
            raise WorkflowError(
                f"configuration: {key}: the path {path!r} is empty, begins with - or ~, begins or ends with a blank, "
                "or has braces or control characters"
            )
    results = Path(config["results"])
    if ".." in results.parts or results.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise WorkflowError(f"configuration: results: {str(results)!r} is no folder of its own, named without ..")


def sources():
    """The sources of the data, with their paths under the data's root."""
    entries = []
    for source in config["data"]["sources"]:
        entry = {key: str(DATA / value) if key in SOURCE_FILES else value for key, value in source.items()}
        if "karpathy" in source["split"]:
            entry["split"] = {"karpathy": str(DATA / source["split"]["karpathy"])}
        entries.append(entry)
    return entries


def without(section, *keys):
    """A section of the configuration but for some of its keys."""
    return {key: value for key, value in section.items() if key not in keys}


try:
    config |= extended(config, "configuration")
    config.pop("extends", None)  # its keys are here now
    schema = Path(workflow.current_basedir) / "../schemas/config.schema.yaml"
    check_schema(config, yaml.safe_load(schema.read_text(encoding="utf-8")), "configuration")
    check_paths()
    check_backbones(config["backbones"])
    EXPERIMENTS = read_sheet(config["experiments"])
    check(EXPERIMENTS, config)
    REHEARSAL = "rehearsal" in config
    CONFIGURED = copy.deepcopy(without(config, "rehearsal"))
    if REHEARSAL:
        config |= rehearsed(CONFIGURED, EXPERIMENTS)
        EXPERIMENTS = rehearsed_sheet(EXPERIMENTS)
    R, SHARED = str(Path(config["results"])), str(Path(CONFIGURED["results"]))  # a rehearsal shares the downloads
    DATA = Path(config["data"]["root"])
    parse_sources(json.dumps(sources()), "configuration: data.sources")
    downloads = read_datasets(config["data"]["downloads"]) if "downloads" in config["data"] else {}
except RoutevlError as error:
    raise WorkflowError(str(error)) from None
DOWNLOADS = {row.folder: row.file for row in downloads.values()}

# `routevl` of the environment that runs Snakemake, also where that was not activated. Each rule's command takes the place of its
# shell: SLURM sends stop signals to all processes of a job, a shell would die of them at once, and Snakemake would not wait until
# training has written its checkpoint. Snakemake formats the prefix.
PROGRAMS = shlex.quote(str(Path(sys.executable).parent)).replace("{", "{{").replace("}", "}}")
shell.prefix(f'export PATH={PROGRAMS}:"$PATH"; set -euo pipefail; exec ')

RUNS = runs_of(EXPERIMENTS)  # name -> experiment, seed
TRIALS = trials_of(EXPERIMENTS, config)  # where a learning rate is tuned: name -> experiment, seed
TRAINED = RUNS | TRIALS


def one_of(names):
    """A wildcard constraint: one of these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    run=one_of(TRAINED),
    shard=r"\d{5}",


def runs_feeding(name):
    """The runs that feed a table or figure, by its short name: F2_main is fed by rows whose `feeds` has F2."""
    short = name.split("_")[0]
    return [run for run, (experiment, _) in RUNS.items() if short in experiment.feeds]


def targets(names, endings):
    """The files of those tables or figures that some experiment feeds; F1 is drawn from the method alone."""
    fed = [name for name in names if name == "F1_method" or runs_feeding(name)]
    return [f"{name}.{ending}" for name in fed for ending in endings]


BACKBONES = {**config["backbones"]["text"], **config["backbones"]["vision"]}
if clash := config["backbones"]["text"].keys() & config["backbones"]["vision"].keys():
    raise WorkflowError(f"configuration: backbones: {clash.pop()} names a text and a vision backbone")


def comes_from(entry):
    """Where a backbone comes from: its pretraining, another backbone, a folder on disk, or the hub."""
    if made := entry.keys() & {"pretrain", "derive"}:
        return made.pop()
    return "folder" if Path(entry["path"]).is_dir() else "hub"


for name, entry in BACKBONES.items():
    if comes_from(entry) == "folder" and "revision" in entry:
        raise WorkflowError(f"configuration: backbones: {name}: a revision of the local folder {entry['path']}; drop it")


def backbones_from(origin, modality=None):
    """A wildcard constraint: the names of all backbones of that origin."""
    entries = config["backbones"][modality] if modality else BACKBONES
    return one_of(name for name, entry in entries.items() if comes_from(entry) == origin)


def backbone(name):
    """The folder of a backbone: the user's own, or one of the workflow's outputs."""
    return str(Path(BACKBONES[name]["path"])) if comes_from(BACKBONES[name]) == "folder" else f"{R}/backbones/{name}"


def recorded(rule, *names, job=None, results=R):
    """The beginning of a job's command line, which lets `routevl record` write its manifest; `names` are its wildcards."""
    values = [f"{{wildcards.{name}:q}}" for name in names]
    wildcards = " ".join(f"{name}={value}" for name, value in zip(names, values))
    manifest = f"{shlex.quote(results)}/manifests/{rule}/{job or '-'.join(values) or rule}.json"
    return f"routevl record --manifest {manifest} --wildcards {wildcards} --inputs {{input:q}} --outputs {{output:q}} -- "


def gpus(n):
    """The resource by which n GPUs are asked for: sbatch's --gpus, or its --gres where the cluster wants that."""
    if n == 0:
        return {}
    return {"gpu": n} if config.get("gpu_flag", "gpus") == "gpus" else {"gres": f"gpu:{n}"}


PROCESSES = max(config["training"]["gpus"], 1)  # of a training job
# torchrun starts them, each on a GPU of its own; the output of the first is shown, and stop signals are passed on to all
TORCHRUN = "torchrun --standalone --local-ranks-filter 0 --signals-to-handle SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT --no-python"
LAUNCH = f"{TORCHRUN} --nproc-per-node {PROCESSES} routevl" if PROCESSES > 1 else "routevl"


def growing(amount, most):
    """What grows with each attempt, so that a job which ran out of it succeeds when it is retried; `most` at most. In a rehearsal it
    does not: what was too little shows."""
    return lambda wildcards, attempt: min(amount * (1 if REHEARSAL else attempt), most)


def limit(key, otherwise):
    """The configuration's `max_<key>`, or what is otherwise the limit; no stage may be configured to ask for more."""
    most = config.get(f"max_{key}", otherwise)
    for section, values in config.items():
        if isinstance(values, dict) and values.get(key, 0) > most:
            raise WorkflowError(f"configuration: {section}.{key}: {values[key]} is more than max_{key}, {most}")
    return most


RULE_RUNTIME = 60  # minutes of the rules that the configuration gives no time
STAGES = [config[section] for section in ("data", "features", "training", "scoring")]
MAX_RUNTIME = limit("runtime", max(RULE_RUNTIME, *(stage["runtime"] for stage in STAGES)))
MAX_MEM_MB = limit("mem_mb", math.inf)


def memory(mb):
    """The memory of a job, which grows with each attempt."""
    return growing(mb, MAX_MEM_MB)


def time_to_restart(minutes):
    """The time of a job that starts again when it is retried; it grows with each attempt. One that resumes needs the same again."""
    return growing(minutes, MAX_RUNTIME)


def option(name, value):
    """One option of the command line, quoted."""
    if value is None or isinstance(value, bool):
        value = command_line_options.text_of(value)
    values = value if isinstance(value, list) else [value]
    return f"--{name.replace('_', '-')} {' '.join(shlex.quote(str(value)) for value in values)}"


def options(values):
    """Options from a mapping, in its order."""
    return " ".join(option(name, value) for name, value in values.items())


def derivation_of(wildcards):
    """The row of the list of derivations that a derived backbone is made by."""
    return DERIVATIONS[BACKBONES[wildcards.derived]["derive"]["by"]]


def derived_from(wildcards):
    """What a derived backbone is made of: another one, the data where the derivation calibrates, a vision model that it joins."""
    entry = BACKBONES[wildcards.derived]["derive"]
    data = {"data": f"{R}/data"} if derivation_of(wildcards).calibrates else {}
    joined = {"vision_backbone": backbone(entry["with"])} if "with" in entry else {}
    return {"source": backbone(entry["from"]), **data, **joined}


def derived_with(wildcards):
    """How a derivation that trains does so, as options of the command line."""
    if not derivation_of(wildcards).trains:
        return ""
    names = ("checkpoint_every", "threads", "workers")
    return options({"checkpoint": f"{R}/checkpoints/{wildcards.derived}", **{name: config["training"][name] for name in names}})


def where_it_trains(trained, otherwise):
    """What a derivation asks for that trains, and any other one: values, or functions of wildcards and attempt."""

    def asked_for(wildcards, attempt):
        chosen = trained if derivation_of(wildcards).trains else otherwise
        return chosen(wildcards, attempt) if callable(chosen) else chosen

    return asked_for


def derivation(entry):
    """How a backbone is derived, as options of the command line."""
    words = command_line_options.words_of(entry.get("options", {}))
    return options({"by": entry["by"], **({"options": words} if words else {})})


def experiment_of(wildcards):
    """The row of the sheet that a job is of, by the name of its run or by its own."""
    if "run" in wildcards.keys():
        return TRAINED[wildcards.run][0]
    return next(experiment for experiment in EXPERIMENTS if experiment.experiment == wildcards.experiment)


def run_settings(runs, **several):
    """The settings of runs that differ in the seed alone, as options of the command line; `several`: values in place of one."""
    experiment, seeds = TRAINED[runs[0]][0], [TRAINED[run][1] for run in runs]
    settings = settings_of(experiment, seeds[0], config).as_record()
    words = command_line_options.words_of(settings.pop("options"))
    return options({**settings, "seed": seeds, **several, **({"options": words} if words else {})})


def trial_settings(wildcards):
    """The same of an experiment's trials, with all learning rates that are tried."""
    rate = settings_of(*TRIALS[wildcards.run], config).learning_rate
    rates = [float(f"{factor * rate:.6g}") for factor in config["tuning"]["factors"]]
    return run_settings([wildcards.run], learning_rate=rates)


def probes_of(runs):
    """What the method of runs finds before training, for each of them; nothing of a method without such a phase."""
    return [f"{R}/probes/{run}/prepared.safetensors" for run in runs if prepares(TRAINED[run][0])]


def run_of(file):
    """The run that an output of the rule `probe` is of."""
    return Path(file).parent.name


def tuned_by(experiment):
    """What chooses an experiment's learning rate; nothing where the sheet or the configuration says it."""
    return [f"{R}/tuning/{run}.json" for run, (tried, _) in TRIALS.items() if tried is experiment]


def prepared_option(wildcards, input):
    """The same as an option of the command line."""
    return options({"prepared": list(input.prepared)}) if input.prepared else ""


def prepares(experiment):
    """Whether its method has a phase before training."""
    return method_class(experiment.method).prepares()


def reads_pixels(experiment):
    """Whether the vision model runs in the training process, so that no stored features are needed."""
    return "pixels" in method_class(experiment.method).needs


def trained_with():
    """Run -> the runs of the job that trains it: as many seeds of an experiment as share one."""
    found, size = {}, config["training"].get("seeds_per_job", 1)
    for experiment in EXPERIMENTS:
        for start in range(0, len(experiment.runs), size):
            job = experiment.runs[start : start + size]
            found |= dict.fromkeys(job, job)
    return found


TRAINED_WITH = trained_with()

# Runs of an experiment that differ in the seed alone can share a job, which loads its libraries once: rules of their own, since a
# rule has the same number of outputs in all its jobs.
ALONE = [run for run, job in TRAINED_WITH.items() if len(job) == 1]
JOBS = {(): []}  # seeds -> the experiments that have a job of them; none: of the runs that are alone
for run, job in TRAINED_WITH.items():
    if len(job) > 1 and run == job[0]:
        JOBS.setdefault(tuple(RUNS[name][1] for name in job), []).append(RUNS[run][0].experiment)


def named_after(rule, seeds):
    """The name of a rule for jobs of those seeds."""
    return "_".join(map(str, [f"{rule}_seeds", *seeds] if seeds else [rule]))


def runs_in(seeds):
    """The runs of a job of those seeds, with wildcards in their names."""
    return [f"{{experiment}}_seed{seed}" for seed in seeds] or ["{run}"]


def shard_names():
    n = config["features"]["shards"]
    return [f"shard-{shard:05d}-of-{n:05d}.safetensors" for shard in range(n)]


def run_inputs(wildcards):
    """What a run is trained, and its method prepared, from."""
    experiment = experiment_of(wildcards)
    folder = f"{R}/features/{experiment.vision_backbone}"
    features = {} if reads_pixels(experiment) else {"features": [f"{folder}/{name}" for name in ("index.json", *shard_names())]}
    backbones = {"text_backbone": backbone(experiment.text_backbone), "vision_backbone": backbone(experiment.vision_backbone)}
    return {"data": f"{R}/data", **features, **backbones}


def run_input_options(wildcards, input):
    """The same as options of the command line; of the features their folder."""
    return options(
        {name: Path(input.features[0]).parent if name == "features" else input[name] for name in run_inputs(wildcards)}
    )


def source_files(wildcards):
    """The files and folders that preparation reads; of the demo world and of archives the folder that holds them."""
    vocabulary = [config["data"]["vocabulary"]] if "vocabulary" in config["data"] else []
    if "world" in config:
        return [f"{R}/world", *vocabulary]
    entries = [*sources(), *(source["split"] for source in sources() if "karpathy" in source["split"])]
    named = [entry[key] for entry in entries for key in (*SOURCE_FILES, "karpathy") if key in entry]
    paths = [Path(path) for path in [*named, *vocabulary]]
    archives = [DATA / folder for folder in DOWNLOADS]
    return sorted({str(next((archive for archive in archives if path.is_relative_to(archive)), path)) for path in paths})


def scoring_batches():
    """The runs of each scoring job: those that are compared with one baseline, directly or by others, in the order of the sheet.

    So a new row of the sheet changes the jobs of its own baseline alone.
    """
    versus = {experiment.experiment: experiment.versus for experiment in EXPERIMENTS}
    compared = {}
    for run, (experiment, _) in RUNS.items():
        baseline = experiment.experiment
        while versus[baseline]:
            baseline = versus[baseline]
        compared.setdefault(baseline, []).append(run)
    size = config["scoring"]["runs_per_job"]
    return [runs[start : start + size] for runs in compared.values() for start in range(0, len(runs), size)]


def results_of_runs(wildcards):
    """What a table or figure reads of its runs, and of those that they are compared with."""
    runs = runs_feeding(wildcards.name)
    versus = {RUNS[run][0].versus for run in runs}
    runs += [run for run, (experiment, _) in RUNS.items() if experiment.experiment in versus and run not in runs]
    inside = [f"{R}/inside/{run}.json" for run in runs_feeding("F7")] if wildcards.name == "F7_inside" else []
    return [f"{R}/{kind}/{run}" for run in runs for kind in ("models", "predictions", "scores")] + inside


def released():
    """What has been released, so that `all`, and an audit, know of it."""
    return [f"{R}/release/{run}" for run in RUNS if Path(f"{R}/manifests/release/{run}.json").exists()]


def environment_lock():
    """The lock file, as a part of the report; nothing where the workflow runs in a folder without it."""
    flags = {"caption": "../report/lock.rst", "category": "Audit", "labels": {"file": "environment lock"}}
    return [report(str(LOCK), **flags)] if LOCK.exists() else []


def do_not_wake_in_vain():
    """Lift Snakemake's limit on jobs per second where they run on this machine, whose cores limit them. Where there is a limit,
    Snakemake's scheduler looks at all jobs again a second after each look, for ever, in a chain of its own for each job that has
    ended: after two hundred jobs that took two fifths of a core (9.27)."""
    if workflow.executor_plugin.name == "local":
        workflow.scheduler.job_rate_limiter = None


def refuse_to_do_twice():
    """Stop where jobs of a killed Snakemake are still in SLURM's queue: they would delete what this one makes, and make it again."""
    if workflow.executor_plugin.name != "slurm":
        return
    prefix = f"{workflow.executor_settings.jobname_prefix}_"
    squeue = ["squeue", "--me", "--noheader", "--format=%j %Z"]
    jobs = [line.split(maxsplit=1) for line in subprocess.run(squeue, capture_output=True, text=True).stdout.splitlines()]
    names = {name for name, folder in jobs if folder == str(Path.cwd()) and name.startswith(prefix)}
    if names:
        raise WorkflowError(
            "jobs of an earlier Snakemake are still in SLURM's queue: wait for them, or cancel them with "
            f"scancel --me --name={','.join(sorted(names))}"
        )


def refuse_what_slurm_cannot_carry():
    """Stop where a job's command, which the SLURM plugin quotes as Python does, would reach the job as another one."""
    if workflow.executor_plugin.name != "slurm":
        return
    settings = workflow.config_settings
    words = [workflow.main_snakefile, *settings.configfiles, *(settings.config_args or [])]
    for word in map(str, words):
        if set("$`\\") & set(word) or {"'", '"'} <= set(word) or word[0] in "'\"":
            raise WorkflowError(f"{word}: a $, ` or \\, quotes of both kinds or a quote at its begin do not reach SLURM's jobs")
    if shlex.quote(sys.executable) != sys.executable or "%" in os.getcwd():
        raise WorkflowError(
            f"{sys.executable}, {os.getcwd()}: SLURM's jobs need an environment without blanks or quotes in its path, and a "
            "folder without %"
        )


def say_what_slurm_did(logs):
    """Say at the end, in one line each, which jobs SLURM has refused or killed, and what to change; `logs` are Snakemake's."""
    if workflow.executor_plugin.name == "slurm":
        for line in slurm.faults("".join(Path(log).read_text(encoding="utf-8") for log in logs)):
            print(f"routevl: error: {line}", file=sys.stderr)


def check_models():
    """Stop, before any job, where models, methods and tasks of the sheet do not fit together; once for each configuration. Also a
    rehearsal asks for all of it.

    It is no rule: jobs would have to wait for it, and Snakemake leaves out whatever else has changed downstream of a job that a new
    row of the sheet brings up, where they wait by an `ancient` file.
    """
    models = [Path(entry["path"]) / "config.json" for entry in BACKBONES.values() if comes_from(entry) == "folder"]
    files = [sha256_of(path) for path in (CONFIGURED["experiments"], *models) if Path(path).is_file()]
    versions = [version(name) for name in ("routevl", "transformers", "timm", "peft")]
    asked = digest_of([CONFIGURED, files, versions])
    record, configuration = Path(R) / "checked_models.json", Path(R) / "manifests" / "configuration.json"
    if record.is_file() and read_json(record)["asked"] == asked:
        return
    write_json(configuration, CONFIGURED)
    options_of_check = ["--configuration", str(configuration), "--asked", asked, "--output", str(record)]
    command = [program("routevl"), "check-models", *options_of_check]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise WorkflowError("\n".join(line for line in done.stdout.splitlines() if "error: " in line) or done.stdout)


def command_line_config():
    """Which configuration this is, as `routevl audit` gives it to Snakemake again."""
    settings = workflow.config_settings
    return {
        "configfiles": [os.path.relpath(path) for path in settings.configfiles],
        "config": settings.config_args,
    }

# A method's phase before training, the trials of a row whose learning rate is tuned, then training with the test split's
# predictions. A job that was stopped resumes from its checkpoint, which is no output of the rule: Snakemake removes the outputs of
# unfinished jobs.


for seeds, experiments in JOBS.items():
    runs = runs_in(seeds)

    # Only for runs whose method looks at the model and the data before training. A phase that is short starts over, a search resumes.
    rule:
        name:
            named_after("probe", seeds)
        input:
            unpack(run_inputs),
        output:
            [f"{R}/probes/{run}/prepared.safetensors" for run in runs],
        log:
            f"{R}/logs/probe/{runs[0]}.log",
        benchmark:
            f"{R}/benchmarks/probe/{runs[0]}.tsv"
        wildcard_constraints:
            run=one_of([*ALONE, *TRIALS]),
            experiment=one_of(experiments),
        threads: config["training"]["threads"]
        resources:
            **gpus(min(config["training"]["gpus"], 1)),
            cpus_per_task=config["training"]["threads"],
            mem_mb=memory(config["training"]["mem_mb"]),
            runtime=time_to_restart(config["training"]["runtime"]),
        params:
            job=lambda wildcards, output: run_of(output[0]),
            inputs=run_input_options,
            settings=lambda wildcards, output: run_settings([run_of(file) for file in output]),
            checkpoints=lambda wildcards, output: [f"{R}/checkpoints/{run_of(file)}.probe" for file in output],
            threads=config["training"]["threads"],
            workers=config["training"]["workers"],
            checkpoint_every=config["training"]["checkpoint_every"],
        shell:
            recorded("probe", job="{params.job:q}") + "routevl probe {params.inputs} --output {output:q} "
            "--checkpoint {params.checkpoints:q} --checkpoint-every {params.checkpoint_every} "
            "--threads {params.threads} --workers {params.workers} {params.settings} &> {log:q}"


# Only for rows with `learning_rate=tuned`: all trials of a row in one process, which its runs wait for.
rule tune:
    input:
        unpack(run_inputs),
        prepared=lambda wildcards: probes_of([wildcards.run]),
    output:
        f"{R}/tuning/{{run}}.json",
    log:
        f"{R}/logs/tune/{{run}}.log",
    benchmark:
        f"{R}/benchmarks/tune/{{run}}.tsv"
    wildcard_constraints:
        run=one_of(TRIALS),
    threads: config["training"]["threads"] * PROCESSES
    resources:
        **gpus(config["training"]["gpus"]),
        cpus_per_task=config["training"]["threads"] * PROCESSES,
        mem_mb=memory(config["training"]["mem_mb"]),
        runtime=config["training"]["runtime"],
    params:
        launch=LAUNCH,
        inputs=run_input_options,
        prepared=prepared_option,
        settings=trial_settings,
        checkpoint=lambda wildcards: f"{R}/checkpoints/{wildcards.run}",
        threads=config["training"]["threads"],
        workers=config["training"]["workers"],
        checkpoint_every=config["training"]["checkpoint_every"],
        log_every=config["training"]["log_every"],
    shell:
        recorded("tune", "run") + "{params.launch} tune {params.inputs} {params.prepared} --output {output:q} "
        "--checkpoint {params.checkpoint:q} --checkpoint-every {params.checkpoint_every} --log-every {params.log_every} "
        "--threads {params.threads} --workers {params.workers} {params.settings} &> {log:q}"


for seeds, experiments in JOBS.items():
    runs = runs_in(seeds)

    rule:
        name:
            named_after("train", seeds)
        input:
            unpack(run_inputs),
            prepared=lambda wildcards, runs=runs: probes_of([run.format_map(wildcards) for run in runs]),
            tuned=lambda wildcards: tuned_by(experiment_of(wildcards)),
        output:
            model=[directory(f"{R}/models/{run}") for run in runs],
            predictions=[directory(f"{R}/predictions/{run}") for run in runs],
        log:
            f"{R}/logs/train/{runs[0]}.log",
        benchmark:
            f"{R}/benchmarks/train/{runs[0]}.tsv"
        wildcard_constraints:
            run=one_of(ALONE),
            experiment=one_of(experiments),
        threads: config["training"]["threads"] * PROCESSES
        resources:
            **gpus(config["training"]["gpus"]),
            cpus_per_task=config["training"]["threads"] * PROCESSES,
            mem_mb=memory(config["training"]["mem_mb"]),
            runtime=config["training"]["runtime"],
        params:
            launch=LAUNCH,
            job=lambda wildcards, output: Path(output.model[0]).name,
            inputs=run_input_options,
            prepared=prepared_option,
            tuned=lambda wildcards, input: options({"tuned": input.tuned[0]}) if input.tuned else "",
            settings=lambda wildcards, output: run_settings([Path(model).name for model in output.model]),
            checkpoints=lambda wildcards, output: [f"{R}/checkpoints/{Path(model).name}" for model in output.model],
            threads=config["training"]["threads"],
            workers=config["training"]["workers"],
            checkpoint_every=config["training"]["checkpoint_every"],
            log_every=config["training"]["log_every"],
        shell:
            recorded("train", job="{params.job:q}") + "{params.launch} train {params.inputs} {params.prepared} {params.tuned} "
            "--model {output.model:q} --predictions {output.predictions:q} --checkpoint {params.checkpoints:q} "
            "--checkpoint-every {params.checkpoint_every} --log-every {params.log_every} "
            "--threads {params.threads} --workers {params.workers} {params.settings} &> {log:q}"

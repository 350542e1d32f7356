# One job per run: training, then the test split's predictions, in one process. A job that was stopped resumes from its checkpoint,
# which is no output of the rule: Snakemake removes the outputs of unfinished jobs.


# Only for runs whose method looks at the model and the data before training.
rule probe:
    input:
        unpack(run_inputs),
    output:
        f"{R}/probes/{{run}}/prepared.safetensors",
    log:
        f"{R}/logs/probe/{{run}}.log",
    benchmark:
        f"{R}/benchmarks/probe/{{run}}.tsv"
    threads: config["training"]["threads"]
    resources:
        **gpus(min(config["training"]["gpus"], 1)),
        cpus_per_task=config["training"]["threads"],
        mem_mb=memory(config["training"]["mem_mb"]),
        runtime=time_to_restart(config["training"]["runtime"]),
    params:
        inputs=run_input_options,
        settings=run_settings,
        threads=config["training"]["threads"],
        workers=config["training"]["workers"],
    shell:
        recorded("probe", "run") + "routevl probe {params.inputs} --output {output:q} "
        "--threads {params.threads} --workers {params.workers} {params.settings} &> {log:q}"


rule train:
    input:
        unpack(run_inputs),
        prepared=lambda wildcards: [f"{R}/probes/{wildcards.run}/prepared.safetensors"] if prepares(wildcards.run) else [],
    output:
        model=directory(f"{R}/models/{{run}}"),
        predictions=directory(f"{R}/predictions/{{run}}"),
    log:
        f"{R}/logs/train/{{run}}.log",
    benchmark:
        f"{R}/benchmarks/train/{{run}}.tsv"
    threads: config["training"]["threads"] * PROCESSES
    resources:
        **gpus(config["training"]["gpus"]),
        cpus_per_task=config["training"]["threads"] * PROCESSES,
        mem_mb=memory(config["training"]["mem_mb"]),
        runtime=config["training"]["runtime"],
    params:
        launch=LAUNCH,
        inputs=run_input_options,
        prepared=lambda wildcards, input: options({"prepared": input.prepared[0]}) if input.prepared else "",
        settings=run_settings,
        checkpoint=f"{R}/checkpoints/{{run}}",
        threads=config["training"]["threads"],
        workers=config["training"]["workers"],
        checkpoint_every=config["training"]["checkpoint_every"],
        log_every=config["training"]["log_every"],
    shell:
        recorded("train", "run") + "{params.launch} train {params.inputs} {params.prepared} "
        "--model {output.model:q} --predictions {output.predictions:q} --checkpoint {params.checkpoint:q} "
        "--checkpoint-every {params.checkpoint_every} --log-every {params.log_every} "
        "--threads {params.threads} --workers {params.workers} {params.settings} &> {log:q}"

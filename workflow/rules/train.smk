# One job per run: training, then the test split's predictions, in one process. A job that was stopped goes on from
# its checkpoint, which is no output of the rule: Snakemake removes the outputs of unfinished jobs.


rule train:
    input:
        data=f"{R}/data",
        features=lambda wildcards: f"{R}/features/{RUNS[wildcards.run]['vision_backbone']}/index.json",
        text_backbone=lambda wildcards: backbone(RUNS[wildcards.run]["text_backbone"]),
        vision_backbone=lambda wildcards: backbone(RUNS[wildcards.run]["vision_backbone"]),
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
        mem_mb=growing(config["training"]["mem_mb"]),
        runtime=growing(config["training"]["runtime"]),
    params:
        features=lambda wildcards, input: Path(input.features).parent,
        settings=run_settings,
        checkpoint=f"{R}/checkpoints/{{run}}",
        processes=PROCESSES,
        threads=config["training"]["threads"],
        workers=config["training"]["workers"],
        checkpoint_every=config["training"]["checkpoint_every"],
        log_every=config["training"]["log_every"],
    shell:
        recorded("train", "run") + "routevl train --data {input.data} --features {params.features} "
        "--text-backbone {input.text_backbone} --vision-backbone {input.vision_backbone} "
        "--model {output.model} --predictions {output.predictions} --checkpoint {params.checkpoint} "
        "--checkpoint-every {params.checkpoint_every} --log-every {params.log_every} "
        "--processes {params.processes} --threads {params.threads} --workers {params.workers} {params.settings} &> {log}"

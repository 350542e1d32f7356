# Predictions in the official result formats -> scores of the official metrics, per run and per test item. Several runs
# share a job: METEOR loads its tables for ten seconds, whatever it then scores.


for runs in scoring_batches():

    rule:
        name:
            f"score_{runs[0]}"
        input:
            predictions=expand(f"{R}/predictions/{{run}}", run=runs),
            data=f"{R}/data",
        output:
            [directory(f"{R}/scores/{run}") for run in runs],
        log:
            f"{R}/logs/score/{runs[0]}.log",
        benchmark:
            f"{R}/benchmarks/score/{runs[0]}.tsv"
        priority: 5
        resources:
            mem_mb=memory(config["scoring"]["mem_mb"]),
            runtime=time_to_restart(config["scoring"]["runtime"]),
        params:
            task=RUNS[runs[0]][0].task,
            job=runs[0],  # here, not in the command: that is put together when the loop is over
        shell:
            recorded("score", job="{params.job:q}")
            + "routevl score --task {params.task} --split-folder {input.data:q}/test --predictions {input.predictions:q} "
            "--output {output:q} &> {log:q}"


# Only for figure F7: what the routing functions of trained runs do, on the validation split.
INSIDE = runs_feeding("F7")

for seeds, experiments in JOBS.items():
    runs = runs_in(seeds)

    rule:
        name:
            named_after("inside", seeds)
        input:
            unpack(run_inputs),
            model=[f"{R}/models/{run}" for run in runs],
        output:
            [f"{R}/inside/{run}.json" for run in runs],
        log:
            f"{R}/logs/inside/{runs[0]}.log",
        benchmark:
            f"{R}/benchmarks/inside/{runs[0]}.tsv"
        wildcard_constraints:
            run=one_of([run for run in ALONE if run in INSIDE]),
            experiment=one_of([name for name in experiments if f"{name}_seed{seeds[0]}" in INSIDE]),
        threads: config["training"]["threads"]
        resources:
            **gpus(min(config["training"]["gpus"], 1)),
            cpus_per_task=config["training"]["threads"],
            mem_mb=memory(config["training"]["mem_mb"]),
            runtime=time_to_restart(RULE_RUNTIME),
        params:
            job=lambda wildcards, output: Path(output[0]).stem,
            inputs=run_input_options,
            threads=config["training"]["threads"],
            workers=config["training"]["workers"],
        shell:
            recorded("inside", job="{params.job:q}")
            + "routevl inside {params.inputs} --model {input.model:q} --output {output:q} "
            "--threads {params.threads} --workers {params.workers} &> {log:q}"

# Predictions in the official result formats -> scores of the official metrics, per run and per test item. Several runs
# share a job: METEOR loads its tables for ten seconds, whatever it then scores.


for task, number, runs in scoring_batches():

    rule:
        name:
            f"score_{task}_{number}"
        input:
            predictions=expand(f"{R}/predictions/{{run}}", run=runs),
            data=f"{R}/data",
        output:
            [directory(f"{R}/scores/{run}") for run in runs],
        log:
            f"{R}/logs/score/{task}_{number}.log",
        benchmark:
            f"{R}/benchmarks/score/{task}_{number}.tsv"
        priority: 5
        resources:
            mem_mb=growing(config["scoring"]["mem_mb"]),
            runtime=growing(config["scoring"]["runtime"]),
        params:
            task=task,
            job=f"{task}_{number}",  # here, not in the command: that is put together when the loop is over
        shell:
            recorded("score", job="{params.job}")
            + "routevl score --task {params.task} --split-folder {input.data}/test --predictions {input.predictions} "
            "--output {output} &> {log}"

# Predictions in the official result formats -> scores of the official metrics, per run and per test item. Several runs
# share a job: METEOR loads its tables for ten seconds, whatever it then scores.


def scoring_batches():
    """(task, number, runs) of each scoring job, in the order of the run sheet."""
    size = config["scoring"]["runs_per_job"]
    for task in config["tasks"]:
        runs = [run for run, row in RUNS.items() if row["task"] == task]
        yield from ((task, start // size, runs[start : start + size]) for start in range(0, len(runs), size))


for task, number, runs in scoring_batches():

    rule:
        name:
            f"score_{task}_{number}"
        input:
            predictions=expand(f"{R}/predictions/{{run}}", run=runs),
            data=f"{R}/data",
        output:
            [directory(f"{R}/scores/{run}") for run in runs],
        params:
            task=task,
        log:
            f"{R}/logs/score/{task}_{number}.log",
        benchmark:
            f"{R}/benchmarks/score/{task}_{number}.tsv"
        priority: 5
        resources:
            mem_mb=4000,
            runtime=60,
        shell:
            "routevl score --task {params.task} --split-folder {input.data}/test --predictions {input.predictions} "
            "--output {output} &> {log}"

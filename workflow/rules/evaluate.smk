# Predictions in the official result formats -> scores of the official metrics, per run and per test item.


rule score:
    input:
        data=f"{R}/data",
        predictions=f"{R}/predictions/{{run}}",
    output:
        directory(f"{R}/scores/{{run}}"),
    params:
        task=lambda wildcards: RUNS[wildcards.run]["task"],
    log:
        f"{R}/logs/score/{{run}}.log",
    benchmark:
        f"{R}/benchmarks/score/{{run}}.tsv"
    priority: 5
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "routevl score --task {params.task} --split-folder {input.data}/test --predictions {input.predictions} "
        "--output {output} &> {log}"

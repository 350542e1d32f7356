# Runs as they can be published: the adapter with a model card that has its test scores. Not part of `all`: a release is asked for,
# `snakemake release` for all runs or <results>/release/<run> for one. What has been released once is then kept up to date.


rule release_run:
    input:
        model=f"{R}/models/{{run}}",
        scores=f"{R}/scores/{{run}}",
    output:
        directory(f"{R}/release/{{run}}"),
    log:
        f"{R}/logs/release/{{run}}.log",
    benchmark:
        f"{R}/benchmarks/release/{{run}}.tsv"
    localrule: True
    params:
        manifest=lambda wildcards: f"{R}/manifests/train/{TRAINED_WITH[wildcards.run][0]}.json",
    shell:
        recorded("release", "run") + "routevl release --model {input.model:q} --scores {input.scores:q} "
        "--manifest {params.manifest:q} --output {output:q} &> {log:q}"


rule release:
    input:
        expand(f"{R}/release/{{run}}", run=RUNS),
    localrule: True

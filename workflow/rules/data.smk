# Official-format data: the demo world, or files on disk; checked and split.


rule world:
    output:
        directory(f"{R}/world"),
    log:
        f"{R}/logs/world.log",
    benchmark:
        f"{R}/benchmarks/world.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        options=lambda wildcards: options(config["world"]),
    shell:
        "routevl world {params.options} --output {output} &> {log}"


rule prepare:
    input:
        source_files,
    output:
        directory(f"{R}/data"),
    log:
        f"{R}/logs/prepare.log",
    benchmark:
        f"{R}/benchmarks/prepare.tsv"
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        sources=json.dumps(sources()),
        options=options({key: value for key, value in config["data"].items() if key not in ("root", "sources")}),
    shell:
        "routevl prepare --sources {params.sources:q} {params.options} --output {output} &> {log}"

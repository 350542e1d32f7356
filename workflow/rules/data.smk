# Official-format data: the demo world, or files on disk; checked and split.


rule world:
    output:
        directory(f"{R}/world"),
    params:
        options=lambda wildcards: options(config["world"]),
    log:
        f"{R}/logs/world.log",
    benchmark:
        f"{R}/benchmarks/world.tsv"
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "routevl world {params.options} --output {output} &> {log}"


def source_files(wildcards):
    """The files and folders that the configuration's sources name; the demo world's count as its rule's output."""
    if "world" in config:
        return [f"{R}/world"]
    names = ("images", "questions", "annotations", "captions")
    return [source[name] for source in config["data"]["sources"] for name in names if name in source]


rule prepare:
    input:
        source_files,
    output:
        directory(f"{R}/data"),
    params:
        sources=json.dumps(config["data"]["sources"]),
        options=options({k: v for k, v in config["data"].items() if k != "sources"}),
    log:
        f"{R}/logs/prepare.log",
    benchmark:
        f"{R}/benchmarks/prepare.tsv"
    resources:
        mem_mb=8000,
        runtime=60,
    shell:
        "routevl prepare --sources {params.sources:q} {params.options} --output {output} &> {log}"

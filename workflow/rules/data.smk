# Official-format data: the demo world, downloaded archives, or files on disk; checked and split.


rule world:
    output:
        directory(f"{R}/world"),
    log:
        f"{R}/logs/world.log",
    benchmark:
        f"{R}/benchmarks/world.tsv"
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        options=lambda wildcards: options(config["world"]),
    shell:
        recorded("world") + "routevl world {params.options} --output {output} &> {log}"


if DOWNLOADS:

    # The archive itself is no output: Snakemake would delete what was placed there by hand, or came half.
    rule download:
        output:
            f"{R}/downloads/{{file}}.json",
        log:
            f"{R}/logs/download/{{file}}.log",
        benchmark:
            f"{R}/benchmarks/download/{{file}}.tsv"
        wildcard_constraints:
            file="|".join(map(re.escape, DOWNLOADS.values())),
        localrule: True
        params:
            datasets=config["data"]["downloads"],
            folder=DATA / "downloads",
        shell:
            recorded("download", "file")
            + "routevl download --datasets {params.datasets} --file {wildcards.file} --folder {params.folder} "
            "--record {output} &> {log}"

    rule unpack:
        input:
            lambda wildcards: f"{R}/downloads/{DOWNLOADS[wildcards.folder]}.json",
        output:
            directory(DATA / "{folder}"),
        log:
            f"{R}/logs/unpack/{{folder}}.log",
        benchmark:
            f"{R}/benchmarks/unpack/{{folder}}.tsv"
        wildcard_constraints:
            folder="|".join(map(re.escape, DOWNLOADS)),
        localrule: True
        params:
            datasets=config["data"]["downloads"],
            folder=DATA / "downloads",
            file=lambda wildcards: DOWNLOADS[wildcards.folder],
        shell:
            recorded("unpack", "folder")
            + "routevl unpack --datasets {params.datasets} --file {params.file} --folder {params.folder} "
            "--output {output} &> {log}"


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
        mem_mb=growing(config["data"]["mem_mb"]),
        runtime=growing(config["data"]["runtime"]),
    params:
        sources=json.dumps(sources()),
        options=options(without(config["data"], "root", "downloads", "sources", "mem_mb", "runtime")),
    shell:
        recorded("prepare") + "routevl prepare --sources {params.sources:q} {params.options} --output {output} &> {log}"

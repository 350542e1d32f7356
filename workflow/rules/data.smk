# Official-format data: the demo world, downloaded archives, or files on disk; checked and split.

if REHEARSAL:

    rule rehearsal_sheet:
        input:
            CONFIGURED["experiments"],
        output:
            config["experiments"],
        log:
            f"{R}/logs/rehearsal_sheet.log",
        benchmark:
            f"{R}/benchmarks/rehearsal_sheet.tsv"
        localrule: True
        shell:
            recorded("rehearsal_sheet") + "routevl rehearsal-sheet --experiments {input:q} --output {output:q} &> {log:q}"


rule world:
    output:
        directory(f"{R}/world"),
    log:
        f"{R}/logs/world.log",
    benchmark:
        f"{R}/benchmarks/world.tsv"
    resources:
        mem_mb=memory(2000),
        runtime=time_to_restart(30),
    params:
        options=lambda wildcards: options(config["world"]),
    shell:
        recorded("world") + "routevl world {params.options} --output {output:q} &> {log:q}"


if DOWNLOADS:

    # The archive itself is no output: Snakemake would delete what was placed there by hand, or came half.
    rule download:
        output:
            f"{SHARED}/downloads/{{file}}.json",
        log:
            f"{SHARED}/logs/download/{{file}}.log",
        benchmark:
            f"{SHARED}/benchmarks/download/{{file}}.tsv"
        wildcard_constraints:
            file=one_of(DOWNLOADS.values()),
        localrule: True
        params:
            datasets=config["data"]["downloads"],
            folder=DATA / "downloads",
        shell:
            recorded("download", "file", results=SHARED)
            + "routevl download --datasets {params.datasets:q} --file {wildcards.file:q} --folder {params.folder:q} "
            "--record {output:q} &> {log:q}"

    rule unpack:
        input:
            lambda wildcards: f"{SHARED}/downloads/{DOWNLOADS[wildcards.folder]}.json",
        output:
            directory(DATA / "{folder}"),
        log:
            f"{SHARED}/logs/unpack/{{folder}}.log",
        benchmark:
            f"{SHARED}/benchmarks/unpack/{{folder}}.tsv"
        wildcard_constraints:
            folder=one_of(DOWNLOADS),
        localrule: True
        params:
            datasets=config["data"]["downloads"],
            folder=DATA / "downloads",
            file=lambda wildcards: DOWNLOADS[wildcards.folder],
        shell:
            recorded("unpack", "folder", results=SHARED)
            + "routevl unpack --datasets {params.datasets:q} --file {params.file:q} --folder {params.folder:q} "
            "--output {output:q} &> {log:q}"


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
        mem_mb=memory(config["data"]["mem_mb"]),
        runtime=time_to_restart(config["data"]["runtime"]),
    params:
        sources=json.dumps(sources()),
        options=options(without(config["data"], "root", "downloads", "sources", "mem_mb", "runtime")),
    shell:
        recorded("prepare") + "routevl prepare --sources {params.sources:q} {params.options} --output {output:q} &> {log:q}"

# Visual features, once per image: shards that can be computed on different nodes, and their index.


rule extract:
    input:
        data=f"{R}/data",
        backbone=lambda wildcards: backbone_files("vision", wildcards.vision),
    output:
        f"{R}/features/{{vision}}/shard-{{shard}}-of-{config['features']['shards']:05d}.safetensors",
    log:
        f"{R}/logs/extract/{{vision}}-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/extract/{{vision}}-{{shard}}.tsv"
    wildcard_constraints:
        vision="|".join(config["backbones"]["vision"]),
    threads: config["training"]["threads"]
    resources:
        cpus_per_task=config["training"]["threads"],
        mem_mb=8000,
        runtime=240,
    params:
        backbone=lambda wildcards: options(
            {
                "backbone": backbone_path("vision", wildcards.vision),
                "revision": config["backbones"]["vision"][wildcards.vision].get("revision"),
            }
        ),
        shard=lambda wildcards: int(wildcards.shard),
        options=options({**config["features"], "tokens": None}),
        tokens=" ".join(config["features"]["tokens"]),
    shell:
        "routevl extract --images {input.data}/train/images.json {input.data}/val/images.json {input.data}/test/images.json "
        "{params.backbone} --shard {params.shard} {params.options} --tokens {params.tokens} "
        "--threads {resources.cpus_per_task} --output {output} &> {log}"


rule index_features:
    input:
        lambda wildcards: [f"{R}/features/{wildcards.vision}/{name}" for name in shard_names()],
    output:
        f"{R}/features/{{vision}}/index.json",
    log:
        f"{R}/logs/index_features/{{vision}}.log",
    benchmark:
        f"{R}/benchmarks/index_features/{{vision}}.tsv"
    wildcard_constraints:
        vision="|".join(config["backbones"]["vision"]),
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "routevl index-features --shards {input} --output {output} &> {log}"

# Visual features, once per image: shards that can be computed on different nodes, and their index.


rule extract:
    input:
        data=f"{R}/data",
        backbone=lambda wildcards: backbone(wildcards.vision),
    output:
        f"{R}/features/{{vision}}/shard-{{shard}}-of-{config['features']['shards']:05d}.safetensors",
    log:
        f"{R}/logs/extract/{{vision}}-{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/extract/{{vision}}-{{shard}}.tsv"
    wildcard_constraints:
        vision=one_of(config["backbones"]["vision"]),
    threads: config["training"]["threads"]
    resources:
        **gpus(min(config["training"]["gpus"], 1)),
        cpus_per_task=config["training"]["threads"],
        mem_mb=memory(config["features"]["mem_mb"]),
        runtime=config["features"]["runtime"],
    params:
        shard=lambda wildcards: int(wildcards.shard),
        options=options(without(config["features"], "mem_mb", "runtime")),
    shell:
        recorded("extract", "vision", "shard")
        + "routevl extract --images {input.data:q}/train/images.json {input.data:q}/val/images.json {input.data:q}/test/images.json "
        "--backbone {input.backbone:q} --shard {params.shard} {params.options} "
        "--threads {resources.cpus_per_task} --output {output:q} &> {log:q}"


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
        vision=one_of(config["backbones"]["vision"]),
    localrule: True
    shell:
        recorded("index_features", "vision") + "routevl index-features --shards {input:q} --output {output:q} &> {log:q}"

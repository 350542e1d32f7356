# The demo's own backbones, pretrained on one modality each. Backbones with a `path` need no rule.


rule pretrain_text:
    output:
        directory(f"{R}/backbones/{{text}}"),
    log:
        f"{R}/logs/pretrain/{{text}}.log",
    benchmark:
        f"{R}/benchmarks/pretrain/{{text}}.tsv"
    wildcard_constraints:
        text="|".join(name for name, entry in config["backbones"]["text"].items() if "pretrain" in entry) or "(?!)",
    priority: 10
    threads: config["training"]["threads"]
    resources:
        cpus_per_task=config["training"]["threads"],
        mem_mb=4000,
        runtime=60,
    params:
        options=lambda wildcards: options(config["backbones"]["text"][wildcards.text]["pretrain"]),
    shell:
        "routevl pretrain-text {params.options} --threads {resources.cpus_per_task} --output {output} &> {log}"


rule pretrain_vision:
    output:
        directory(f"{R}/backbones/{{vision}}"),
    log:
        f"{R}/logs/pretrain/{{vision}}.log",
    benchmark:
        f"{R}/benchmarks/pretrain/{{vision}}.tsv"
    wildcard_constraints:
        vision="|".join(name for name, entry in config["backbones"]["vision"].items() if "pretrain" in entry) or "(?!)",
    priority: 20
    threads: config["training"]["threads"]
    resources:
        cpus_per_task=config["training"]["threads"],
        mem_mb=4000,
        runtime=60,
    params:
        options=lambda wildcards: options(config["backbones"]["vision"][wildcards.vision]["pretrain"]),
    shell:
        "routevl pretrain-vision {params.options} --threads {resources.cpus_per_task} --output {output} &> {log}"

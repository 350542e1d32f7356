# The frozen models: fetched from the hub, the demo's own, pretrained on one modality each, or derived from any other, such as a
# pruned one. A folder on disk needs no rule.


rule fetch_backbone:
    output:
        directory(f"{R}/backbones/{{name}}"),
    log:
        f"{R}/logs/fetch_backbone/{{name}}.log",
    benchmark:
        f"{R}/benchmarks/fetch_backbone/{{name}}.tsv"
    wildcard_constraints:
        name=backbones_from("hub"),
    localrule: True
    params:
        options=lambda wildcards: options(
            {"hub_id": BACKBONES[wildcards.name]["path"], "revision": BACKBONES[wildcards.name].get("revision", "main")}
        ),
    shell:
        recorded("fetch_backbone", "name") + "routevl fetch-backbone {params.options} --output {output:q} &> {log:q}"


rule pretrain_text:
    output:
        directory(f"{R}/backbones/{{text}}"),
    log:
        f"{R}/logs/pretrain/{{text}}.log",
    benchmark:
        f"{R}/benchmarks/pretrain/{{text}}.tsv"
    wildcard_constraints:
        text=backbones_from("pretrain", "text"),
    priority: 10
    threads: config["training"]["threads"]
    resources:
        cpus_per_task=config["training"]["threads"],
        mem_mb=memory(4000),
        runtime=time_to_restart(RULE_RUNTIME),
    params:
        options=lambda wildcards: options(BACKBONES[wildcards.text]["pretrain"]),
    shell:
        recorded("pretrain_text", "text")
        + "routevl pretrain-text {params.options} --threads {resources.cpus_per_task} --output {output:q} &> {log:q}"


rule pretrain_vision:
    output:
        directory(f"{R}/backbones/{{vision}}"),
    log:
        f"{R}/logs/pretrain/{{vision}}.log",
    benchmark:
        f"{R}/benchmarks/pretrain/{{vision}}.tsv"
    wildcard_constraints:
        vision=backbones_from("pretrain", "vision"),
    priority: 20
    threads: config["training"]["threads"]
    resources:
        cpus_per_task=config["training"]["threads"],
        mem_mb=memory(4000),
        runtime=time_to_restart(RULE_RUNTIME),
    params:
        options=lambda wildcards: options(BACKBONES[wildcards.vision]["pretrain"]),
    shell:
        recorded("pretrain_vision", "vision")
        + "routevl pretrain-vision {params.options} --threads {resources.cpus_per_task} --output {output:q} &> {log:q}"


# One that trains has what training has of the cluster, and resumes from its checkpoint.
rule derive_backbone:
    input:
        unpack(derived_from),
    output:
        directory(f"{R}/backbones/{{derived}}"),
    log:
        f"{R}/logs/derive_backbone/{{derived}}.log",
    benchmark:
        f"{R}/benchmarks/derive_backbone/{{derived}}.tsv"
    wildcard_constraints:
        derived=backbones_from("derive"),
    threads: where_it_trains(config["training"]["threads"], 1)
    resources:
        **{name: where_it_trains(count, type(count)()) for name, count in gpus(min(config["training"]["gpus"], 1)).items()},
        cpus_per_task=where_it_trains(config["training"]["threads"], 1),
        mem_mb=where_it_trains(memory(config["training"]["mem_mb"]), memory(8000)),
        runtime=where_it_trains(config["training"]["runtime"], time_to_restart(RULE_RUNTIME)),
    params:
        inputs=lambda wildcards, input: options({name: input[name] for name in derived_from(wildcards)}),
        execution=derived_with,
        options=lambda wildcards: derivation(BACKBONES[wildcards.derived]["derive"]),
    shell:
        recorded("derive_backbone", "derived")
        + "routevl derive-backbone {params.inputs} {params.options} {params.execution} --output {output:q} &> {log:q}"

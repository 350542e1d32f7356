# The results and all jobs that made them, described as a Workflow Run RO-Crate. Not part of `all`: a crate is asked for.


rule crate:
    input:
        rules.all.input,
    log:
        f"{R}/logs/crate.log",
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        "routevl crate {params.results:q} &> {log:q}"

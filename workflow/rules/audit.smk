# What the workflow has made, checked by its manifests. Not part of `all`: an audit is asked for.


rule audit:
    input:
        rules.all.input,
    log:
        f"{R}/logs/audit.log",
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        "routevl audit {params.results:q} | tee {log:q}"

# Tables and figures, from results alone: nothing is trained to redraw them. What is marked with `report` goes into the page that
# `snakemake --report report.html` writes.


rule table:
    input:
        results_of_runs,
        experiments=config["experiments"],
        published="config/published.csv",
        claims="config/claims.tsv",
    output:
        multiext(f"{R}/tables/{{name}}", csv=".csv", md=".md", tex=".tex"),
        html=report(
            f"{R}/tables/{{name}}.html",
            caption="../report/caption.rst",
            category="Tables",
            labels={"table": "{name}"},
        ),
    log:
        f"{R}/logs/table/{{name}}.log",
    benchmark:
        f"{R}/benchmarks/table/{{name}}.tsv"
    wildcard_constraints:
        name=one_of(TABLES),
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        recorded("table", "name")
        + "routevl table --name {wildcards.name:q} --experiments {input.experiments:q} --results {params.results:q} "
        "--published {input.published:q} --claims {input.claims:q} --output {output.csv:q} &> {log:q}"


rule figure:
    input:
        results_of_runs,
        data=f"{R}/data",
        experiments=config["experiments"],
    output:
        multiext(f"{R}/figures/{{name}}", png=".png", pdf=".pdf", csv=".csv"),
        svg=report(
            f"{R}/figures/{{name}}.svg",
            caption="../report/caption.rst",
            category="Figures",
            labels={"figure": "{name}"},
        ),
    log:
        f"{R}/logs/figure/{{name}}.log",
    benchmark:
        f"{R}/benchmarks/figure/{{name}}.tsv"
    wildcard_constraints:
        name=one_of(FIGURES),
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        recorded("figure", "name")
        + "routevl figure --name {wildcards.name:q} --experiments {input.experiments:q} --results {params.results:q} "
        "--data {input.data:q}/test --output {output.svg:q} &> {log:q}"


rule tables:
    input:
        expand(f"{R}/tables/{{file}}", file=targets(TABLES, ("csv", "md", "tex", "html"))),
    localrule: True


rule figures:
    input:
        expand(
            f"{R}/figures/{{file}}",
            file=targets(FIGURES, ("svg", "png", "pdf", "csv")),
        ),
    localrule: True


rule provenance:
    input:
        rules.tables.input,
        rules.figures.input,
        experiments=report(
            config["experiments"],
            caption="../report/experiments.rst",
            category="Audit",
            labels={"file": "run sheet"},
        ),
        lock=environment_lock(),
    output:
        report(
            f"{R}/provenance.html",
            caption="../report/provenance.rst",
            category="Audit",
            labels={"file": "provenance"},
        ),
    log:
        f"{R}/logs/provenance.log",
    benchmark:
        f"{R}/benchmarks/provenance.tsv"
    localrule: True
    params:
        results=lambda wildcards: R,
        configuration=json.dumps(config),
    shell:
        recorded("provenance") + "routevl provenance --results {params.results:q} --configuration {params.configuration:q} "
        "--experiments {input.experiments:q} --output {output:q} &> {log:q}"

# Tables and figures, from results alone: nothing is trained to redraw them.


rule table:
    input:
        results_of_runs,
        experiments=config["experiments"],
        published="config/published.csv",
    output:
        multiext(f"{R}/tables/{{name}}", csv=".csv", md=".md", tex=".tex"),
    log:
        f"{R}/logs/table/{{name}}.log",
    benchmark:
        f"{R}/benchmarks/table/{{name}}.tsv"
    wildcard_constraints:
        name="|".join(TABLES),
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        recorded("name") + "routevl table --name {wildcards.name} --experiments {input.experiments} --results {params.results} "
        "--published {input.published} --output {output.csv} &> {log}"


rule figure:
    input:
        results_of_runs,
        data=f"{R}/data",
        experiments=config["experiments"],
    output:
        multiext(f"{R}/figures/{{name}}", svg=".svg", png=".png", pdf=".pdf", csv=".csv"),
    log:
        f"{R}/logs/figure/{{name}}.log",
    benchmark:
        f"{R}/benchmarks/figure/{{name}}.tsv"
    wildcard_constraints:
        name="|".join(FIGURES),
    localrule: True
    params:
        results=lambda wildcards: R,
    shell:
        recorded("name") + "routevl figure --name {wildcards.name} --experiments {input.experiments} --results {params.results} "
        "--data {input.data}/test --output {output.svg} &> {log}"


rule tables:
    input:
        expand(f"{R}/tables/{{file}}", file=targets(TABLES, ("csv", "md", "tex"))),
    localrule: True


rule figures:
    input:
        expand(
            f"{R}/figures/{{file}}",
            file=targets(FIGURES, ("svg", "png", "pdf", "csv")),
        ),
    localrule: True

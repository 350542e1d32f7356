# One DAG from raw data to the paper's tables and figures.
#
#   make demo                                                      the embedded default, on two CPU cores
#   snakemake --cores 2 tables                                     every table; `figures`: every figure
#   snakemake --report report.html                                 all of it in one page, once it is made
#   snakemake --cores 2 audit                                      whether everything still stands
#   snakemake --cores 2 crate                                      everything, described as an RO-Crate
#   snakemake --cores 2 release                                    every run as it can be published, with its model card
#   snakemake --cores 2 tables --configfile config/paper.yaml      another configuration: targets stand before --configfile
from snakemake.utils import min_version

min_version("9.20")


report: "workflow/report/workflow.rst"


# A file given on the command line stands alone; single values given there override the default.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/backbones.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/release.smk"


rule all:
    default_target: True
    input:
        rules.tables.input,
        rules.figures.input,
        rules.provenance.output,
        released(),
    localrule: True


include: "workflow/rules/audit.smk"
include: "workflow/rules/crate.smk"


onstart:
    do_not_wake_in_vain()
    refuse_to_do_twice()
    refuse_what_slurm_cannot_carry()
    log_startup("snakemake")
    write_json(f"{R}/manifests/config.json", command_line_config())
    check_models()


onerror:
    say_what_slurm_did(log)

"""From scored runs to statistics, tables and figures; reads the run sheet and `results/`, never a model.

The workflow imports the names below from here, so this file imports no library.
"""

TABLES = (
    "T0_claims", "T1_vqa", "T2_caption", "T3_multitask", "T4_ablations", "T5_cross_attention", "T6_cost", "T7_methods",
)  # fmt: skip
FIGURES = (
    "F1_method", "F2_main", "F3_rank_budget", "F4_methods", "F5_curves", "F6_question_types", "F7_inside", "F8_examples",
    "F9_controls", "F10_multitask",
)  # fmt: skip

"""From scored runs to statistics, tables and figures; reads the run sheet and `results/`, never a model."""

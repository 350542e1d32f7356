"""Routing functions in the low-rank bottlenecks of vision-language parameter-efficient fine-tuning."""

"""The audit trail: what made each output and from what, whether it still stands, and the same thing made again."""

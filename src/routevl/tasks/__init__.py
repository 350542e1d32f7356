"""Tasks: what goes in, what is learned, what comes out. table.py lists them."""

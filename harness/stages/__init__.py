"""How one stage is done: one module per kind, and shared code."""

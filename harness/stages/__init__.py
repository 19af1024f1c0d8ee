"""How one stage is done: each kind in one module, and what they have in common."""

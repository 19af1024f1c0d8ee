"""How one stage is done: each kind in a module of its own, and what they have in common."""

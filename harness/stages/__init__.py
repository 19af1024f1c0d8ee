"""How stages are run: each kind in one module, and their common parts."""

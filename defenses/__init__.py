"""Defenses, one a file, found by `harness.core.registry`. `base.py` is the contract."""

"""Attacks (adaptation methods), one a file, found by `harness.registry`. `base.py` is the contract."""

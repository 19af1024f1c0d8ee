"""Attacks (adaptations), one a file, found by `harness.core.registry`. The contract: `harness.contracts.attack`."""

"""Defenses, one per file or package, found by `harness.core.registry`. The contract: `harness.contracts.defense`."""

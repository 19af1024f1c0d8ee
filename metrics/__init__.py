"""Metrics, one per file, found by `harness.core.registry`. The contract: `harness.contracts.metric`."""

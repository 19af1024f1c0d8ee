"""Metrics, one a file, found by `harness.core.registry`. The contract: `harness.contracts.metric`."""

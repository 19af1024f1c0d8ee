"""Detectors of memorized prompts, one a file (`harness.contracts.detector`)."""

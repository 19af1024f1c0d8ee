"""Base classes for outside code: defense, attack, metric, task, kind of stage, hook, diagnostic. See `harness.api`."""

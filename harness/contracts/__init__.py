"""Base classes for plug-ins: defense, attack, metric, task, kind of stage, hook, diagnostic. See `harness.api`."""

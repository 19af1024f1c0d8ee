"""What an outsider subclasses: defense, attack, metric, task, kind of stage, hook, diagnostic. See `harness.api`."""

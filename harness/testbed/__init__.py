"""The embedded testbed: a miniature text-to-image model, its evaluators and its pictures."""

"""Code that any room may import: errors, keys, seeds, parameters, words, concepts, registry. No torch, no suites."""

"""What anything may import: errors, keys, seeds, parameters, words, concepts, the registry. No torch, no suite file."""

"""Shared parts of training: losses, one loop, bilevel look-ahead, hypergradients, weights (local or ZeRO), resuming."""

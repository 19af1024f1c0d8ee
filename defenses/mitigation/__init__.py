"""Mitigations of memorization: defenses that release hooks, for drawing or for training, and change no weight."""

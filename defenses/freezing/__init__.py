"""Defenses that freeze tensors of the UNet, and the tables of a run on their masks."""

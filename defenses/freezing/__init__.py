"""Defenses that freeze tensors of the UNet, and the analysis of their masks in a run."""

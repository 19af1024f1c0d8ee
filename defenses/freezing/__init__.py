"""Defenses that freeze tensors of the UNet, and what a run says of their masks."""

"""The diffusion model and its source, drawing images from it, and the environment of a stage (`Run`)."""

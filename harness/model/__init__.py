"""The diffusion model, drawing from it, where it comes from, and the surroundings of a stage (`Run`)."""

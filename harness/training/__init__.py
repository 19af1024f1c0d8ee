"""Shared parts of training: the diffusion loss, encoded images, draws by step, parameter groups, resumable state."""

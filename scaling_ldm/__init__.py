"""Plans, runs and reads scaling studies of latent diffusion models."""

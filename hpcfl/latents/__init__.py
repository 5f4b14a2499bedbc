"""Class Gaussians of latent features."""

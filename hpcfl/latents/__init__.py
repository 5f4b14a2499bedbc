"""Class Gaussians of latents: measured as moments at clients, merged at the server, announced, and drawn from."""

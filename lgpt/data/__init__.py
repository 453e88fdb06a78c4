"""Captioned images, their order and transforms, and the latent cache."""

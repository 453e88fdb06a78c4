"""The VQ-VAE, the transformer and the frozen text encoder."""

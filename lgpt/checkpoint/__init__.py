"""Checkpoints that are whole or absent, and what is made of them."""

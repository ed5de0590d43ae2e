"""Frozen autoencoders between pixels and latents."""

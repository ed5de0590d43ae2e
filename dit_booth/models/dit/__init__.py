"""Video DiT."""

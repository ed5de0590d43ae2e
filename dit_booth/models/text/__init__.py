"""Text encoders besides CLIP's own tower: umT5, with transformers underneath."""

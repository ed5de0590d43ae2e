"""CLIP's tokenizer, text tower and image tower, with open_clip underneath."""

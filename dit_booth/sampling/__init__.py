"""Sampling: videos from image prompts and captions, of a run's held-out examples or a user's own."""

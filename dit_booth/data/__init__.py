"""Training examples: data sets, image prompts, and video files."""

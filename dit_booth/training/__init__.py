"""Training of one stage on a DeepSpeed engine: its inputs, state, loop, checkpoints and log."""

"""Pure key maps between official weights and ours, one module per format."""

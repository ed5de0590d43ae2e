"""Networks: the video DiT and U-Net, the frozen CLIP and autoencoder, and their weights."""

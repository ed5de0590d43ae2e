"""Video U-Net of Stable Diffusion 1.x and VideoBooth."""

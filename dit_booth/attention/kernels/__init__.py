"""Attention kernels, one file each, and the choice among them."""

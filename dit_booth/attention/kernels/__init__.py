"""The kernels that may run a call of attention: one file each, and the choice among them."""

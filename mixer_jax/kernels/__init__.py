"""Custom kernels in Pallas, and the block backends built on them."""

"""Custom kernels for GPUs (Pallas on Triton), and the block backends built on them."""

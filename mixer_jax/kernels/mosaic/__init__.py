"""Custom kernels for TPUs (Pallas on Mosaic), and the block backends built on them."""

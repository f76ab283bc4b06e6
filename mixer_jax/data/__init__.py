"""Data: sources, decoding, augmentation and the input pipeline."""

"""TFDS builders for datasets that are not part of TFDS."""

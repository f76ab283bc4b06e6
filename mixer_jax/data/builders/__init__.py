"""TFDS builders for data sets that TFDS lacks."""

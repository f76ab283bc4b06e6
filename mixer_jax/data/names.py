"""Names of datasets that are not TFDS's. Imports nothing heavy."""

# Prefix of the path of an image folder.
FOLDER = "folder:"
SYNTHETIC = "synthetic"

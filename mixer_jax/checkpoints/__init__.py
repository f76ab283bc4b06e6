"""Checkpoints: saving, restoring, importing and exporting weights."""

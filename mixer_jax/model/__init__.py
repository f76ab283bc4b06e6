"""The model, and its sizes as plain numbers."""

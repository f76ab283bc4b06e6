"""Training: datasets, initialization, optimizer, step and loop."""

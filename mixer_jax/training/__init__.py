"""Training: data sets, initialization, optimizer, step and loop."""

"""What this machine can do: a training step, and the input pipeline beside its peers."""

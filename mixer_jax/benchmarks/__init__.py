"""What this machine can do, beside peers that do the same work."""

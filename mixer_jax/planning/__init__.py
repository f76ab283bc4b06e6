"""What a run would take on accelerators that are not here: memory, traffic, time, cost."""

"""Benchmarks of this machine, with baselines that do the same work."""

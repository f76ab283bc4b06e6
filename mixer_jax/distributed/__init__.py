"""Meshes, sharding, multi-host runs and hardware facts."""

"""Plots of runs and of their training data."""

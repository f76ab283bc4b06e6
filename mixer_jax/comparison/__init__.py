"""Comparison of models on one dataset: accuracy, throughput, FLOPs, parameters and cost."""

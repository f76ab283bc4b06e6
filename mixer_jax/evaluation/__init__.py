"""Evaluation of trained models: exact metrics, feature extraction, probes."""

"""Analysis of compiled XLA programs: memory traffic, matmul FLOPs, collectives, by model region."""

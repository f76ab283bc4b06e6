"""Analysis of compiled HLO programs."""

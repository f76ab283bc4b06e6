"""The recipe, the step and the loop."""

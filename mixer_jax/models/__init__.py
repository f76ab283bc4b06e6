"""Model families, and how they are executed."""

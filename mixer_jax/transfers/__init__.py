"""Suites of transfer tasks: their runs, what comes of them, and the table."""

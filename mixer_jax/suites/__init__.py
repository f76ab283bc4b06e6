"""Transfer suites: tasks, protocol, results and tables."""

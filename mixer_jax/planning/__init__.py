"""Plans of runs on absent accelerators: memory, traffic, communication, time and cost."""

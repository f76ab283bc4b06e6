"""Plans of runs on accelerators that are not attached: memory, communication, time and cost."""

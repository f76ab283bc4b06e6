"""Arguments, exit codes and standard streams shared by all commands."""

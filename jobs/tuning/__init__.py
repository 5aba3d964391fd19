"""The search over configurations: trials, what they reach, the best one."""

"""A comparison of methods: many runs in one process on one base, and what they show together."""

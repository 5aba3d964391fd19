"""Training: one engine, one loop, checkpoints."""

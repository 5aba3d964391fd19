"""Serving: what stands beside an exported task so that any engine asks it as it was trained, and a client that does."""

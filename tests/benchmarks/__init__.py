"""Benchmarks: each module has ``run() -> dict`` with its question, hardware, versions and rows of measures."""

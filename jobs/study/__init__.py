"""Comparisons of methods over suites of tasks."""

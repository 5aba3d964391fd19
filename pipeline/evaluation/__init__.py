"""Evaluation: scores of a test split → metrics with intervals → comparison.

The modules are imported one by one, so that a configuration can be read without what computes the metrics.
"""

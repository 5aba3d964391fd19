"""Slow, obvious implementations of the formulas, one element at a time; the fast ones must agree with them."""

"""Promotion: a pure decision from evidence, then the registry that applies it."""

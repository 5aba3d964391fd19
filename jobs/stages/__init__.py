"""The stages, one file each: a stage takes the artefact before it, is idempotent, and never calls another stage.

Their order stands in :mod:`jobs.main_job`.
"""

"""Entry points: the only place that knows the order of the stages."""

RESULT_MARK = "mtl-lora-result "
"""Begins the line with which a verb inside a Ray job hands its result to the one who waits for it."""

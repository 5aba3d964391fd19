"""Entry points: the only place that knows the order of the stages."""

RESULT_MARK = "mtl-lora-result "
"""Begins the line with which a verb inside a Ray job hands its result to the one who waits for it."""
SECRETS = "MTL_LORA_REQUIRED_SECRETS"
"""Variable that tells a job the names of the secrets which its environment must hold."""

"""Entry points: the only place that knows the order of the stages."""

SECRETS = "MTL_LORA_REQUIRED_SECRETS"
"""Variable that tells a job the names of the secrets which its environment must hold."""

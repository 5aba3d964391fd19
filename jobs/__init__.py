"""Entry points: the only place that knows the order of the stages."""

SECRETS = "MTL_LORA_REQUIRED_VARIABLES"
"""Variable that tells a job the names of the secrets which its environment must hold; its own name is not that of a
secret, since the values of those are masked wherever they stand."""

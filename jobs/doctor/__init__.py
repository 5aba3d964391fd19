"""``mtl-lora doctor``: whether machine, cluster, registry and storage are fit for a run, and what to do where not."""

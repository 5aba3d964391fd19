"""The language model: frozen base, adapter, prompts and label scoring."""

"""LoRA adapters on one frozen linear layer: the domain, free of any web framework."""

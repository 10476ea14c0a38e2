"""LLaVA with tokens dropped between decoder layers, LoRA, and the embedded model."""

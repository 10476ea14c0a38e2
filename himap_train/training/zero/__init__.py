"""DeepSpeed ZeRO with LoRA: the strategy, its precision and its checkpoints."""

"""Models: loading and checking, packed attention, LoRA, distribution over ranks, metadata."""

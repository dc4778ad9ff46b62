"""The training room: the near-policy loss, the trainer, and its checkpoints."""

"""Training: the near-policy loss, the trainer, checkpoints and sharding."""

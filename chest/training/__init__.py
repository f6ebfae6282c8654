"""The training loop and its parts: sampling, losses, augmentation, checkpointing."""

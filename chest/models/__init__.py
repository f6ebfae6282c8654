"""Checkpoints, devices, pixels, batched inference, and one module per family of models."""

"""What models of every family need: checkpoints, device, pixels, batched inference."""

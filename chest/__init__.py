"""Code that the stages and tools share, in six layers: each imports only from those before it."""

"""Vision-language models that are asked what an image shows."""

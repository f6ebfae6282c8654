"""Charts, model card and review report."""

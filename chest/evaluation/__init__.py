"""Predictions, metrics with intervals, subgroups, blind baselines and comparisons."""

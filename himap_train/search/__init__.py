"""Layers and ratios for a budget, found on data without training."""

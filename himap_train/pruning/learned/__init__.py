"""Learnable keep ratios: the ratios, and what gives them a gradient while tokens are really removed."""

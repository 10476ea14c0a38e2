"""Metrics and the evaluation of a model under a schedule."""

"""Benchmarks from their own files: what their columns mean, how they are asked and scored, and what servers take."""

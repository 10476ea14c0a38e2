"""Answering a data set and scoring the answers."""

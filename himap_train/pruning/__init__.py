"""Pruning as pure tensor code: schedules, scores, selection and cost. Knows torch and nothing else."""

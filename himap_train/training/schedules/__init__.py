"""How the schedule changes while a model is trained: curriculum, elastic budgets, dense steps, learned ratios."""

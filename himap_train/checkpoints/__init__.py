"""What is written and read again: adapter with schedule, merged models, cards, and whether they agree."""

"""The small LLaVA and the scenes that ship with the package, and how they were made."""

"""The nouns every part shares. Standard library only; imports nothing of the project."""

"""Data sets for examples and experiments that need no download."""

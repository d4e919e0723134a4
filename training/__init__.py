"""Heads for a model one already has: its own answers, heads trained on them, a tree, files to serve."""

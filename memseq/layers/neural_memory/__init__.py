"""Memories that are networks, trained while they are read."""

"""Layers that retrieve stored patterns, after Hopfield networks."""

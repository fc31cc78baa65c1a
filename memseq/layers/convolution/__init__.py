"""Layers that remember the last few tokens alone, in a short convolution."""

"""Memories with Hebbian writes: what is written is added to what decays."""

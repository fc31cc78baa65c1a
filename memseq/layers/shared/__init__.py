"""Layers that leave what they hold to the layers of a model above them, and those that read it."""

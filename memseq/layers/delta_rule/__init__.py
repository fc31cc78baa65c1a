"""Memories that write what they got wrong."""

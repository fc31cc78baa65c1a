"""Memories that keep every key and value: softmax attention and its cache."""

"""Recurrent memories of vectors: gated, with or without nonlinear feedback."""

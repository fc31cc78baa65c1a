"""Mixtures of memories: a router sends each token to a few of several memories."""

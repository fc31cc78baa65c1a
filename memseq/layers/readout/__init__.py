"""Layers whose read-out does more than a product: it solves, weighs levels, or sees a prefix."""

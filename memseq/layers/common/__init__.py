"""Parts that layers of several families share."""

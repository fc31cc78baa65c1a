"""Building blocks that several memory operations share."""

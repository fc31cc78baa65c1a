"""Training: state, step, loop, optimisers, checkpoints, metrics and progress."""

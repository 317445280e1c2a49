"""Training of some or all weights on a task."""

"""Floor 2: the model IR, the one way to rewrite it, contracts, and the planner."""

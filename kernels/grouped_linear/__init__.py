"""grouped_linear: linear layers of which each row takes its own, the experts of a mixture."""

"""Same role, other factors."""

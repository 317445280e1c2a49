"""rope: queries and keys turned by their positions, taken from one fused projection and put where they go."""

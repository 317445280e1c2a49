"""Other blocks in the place of those there are."""

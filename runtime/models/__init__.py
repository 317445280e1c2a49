"""Where models come from: one file for each source that a recipe can name."""

"""More layers or width from a smaller model."""

"""Parts of a training stage."""

"""Parts that fill a slot of a stage."""

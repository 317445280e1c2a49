"""Data sources: text in, packed and split token sequences out."""

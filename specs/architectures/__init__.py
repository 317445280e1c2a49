"""Architectures as data: configuration keys and tensor names to blocks, and back."""

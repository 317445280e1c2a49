"""Norms of fresh models."""

"""Attention of fresh models."""

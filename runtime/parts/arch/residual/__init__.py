"""Residual branches of fresh models."""

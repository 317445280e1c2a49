"""Weights shared across layers."""

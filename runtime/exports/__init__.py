"""Formats a model leaves in, each verified by the tool that reads it."""

"""Machines as data: memory, rates, bandwidth."""

"""Shipped recipes; each is compiled by a test."""

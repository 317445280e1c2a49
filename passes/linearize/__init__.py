"""Attention as a recurrence: constant memory and time a token."""

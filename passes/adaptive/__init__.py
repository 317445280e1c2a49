"""Spend less on some tokens or inputs: leave early, skip layers, run a part of a block or of its width."""

"""Mixtures of experts: make, steer and fold feed-forward blocks of which a token runs through a part."""

"""Blocks of fresh models: `new(llama, attention = gated_attention(), ...)`."""

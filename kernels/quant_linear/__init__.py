"""quant_linear: weights of 2, 3, 4 or 8 bits in groups, activations as bytes by row and group."""

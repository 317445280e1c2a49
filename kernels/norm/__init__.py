"""norm: RMS or layer normalisation of rows, in C."""

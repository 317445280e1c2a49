"""byte_linear: linear layers on a GPU whose rows of x become bytes, int8 or float8, each with a scale."""

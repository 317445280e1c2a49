"""A whole decoding step as one C program: the calls of a model in order, one entry, one piece of work."""

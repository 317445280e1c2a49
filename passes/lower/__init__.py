"""The last family: from a model's ops to the kernels that run them. Its files are no methods of recipes."""

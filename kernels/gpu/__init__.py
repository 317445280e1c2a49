"""Triton kernels: text to a module, an interpreter to be trusted, compilation for Hopper without a GPU."""

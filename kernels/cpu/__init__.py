"""C kernels on this machine: instruction sets, shared text, compiler, threads."""

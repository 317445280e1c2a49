"""gated: the activation of one half of a row times the other half, SwiGLU and GeGLU."""

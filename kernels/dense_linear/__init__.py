"""dense_linear: y = epilogue(x W^T) with W as stored, float32 or 16 bits, in C."""

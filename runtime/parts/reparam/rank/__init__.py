"""How many singular values a factored weight keeps."""

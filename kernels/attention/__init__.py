"""attention: softmax(scale q k^T) v over packed sequences on a GPU, for training and long prompts."""

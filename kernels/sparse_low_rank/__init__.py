"""sparse_low_rank: a linear whose weight is a thin product plus scattered numbers, trained on a GPU."""

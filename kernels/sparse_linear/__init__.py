"""sparse_linear: quant_linear over weights of which many are zero; a bit for each says which are stored."""

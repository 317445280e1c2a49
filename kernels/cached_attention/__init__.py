"""cached_attention: keys and values into a cache, and each token's attention to what its sequence holds."""

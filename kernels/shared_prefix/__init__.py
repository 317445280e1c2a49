"""shared_prefix: attention of a decoding batch whose sequences share what they begin with."""

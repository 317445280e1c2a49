"""binary_planes: weights as planes of signs times scales, added up from tables of sums of activations."""

"""linear_attention: a gated linear recurrence: chunks for training and prompts, one step for decoding."""

"""linear_loss: the cross-entropy of a head's logits, which are never whole in memory, and its gradients."""

"""experts: a mixture's feed-forward networks in C: route, put rows by expert, multiply, add up again."""

"""Training through the trie: per-token log-probabilities with gradients, shared tokens computed once."""

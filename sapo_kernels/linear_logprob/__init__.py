"""Log-probabilities of given tokens straight from hidden states and the output matrix."""

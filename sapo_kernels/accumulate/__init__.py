"""Sums of log-probabilities by cell, piece by piece, in place."""

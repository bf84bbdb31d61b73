"""The running loss of every prompt of every pool, and the weights that follow from it, in place."""

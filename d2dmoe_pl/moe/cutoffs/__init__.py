"""Which values of a token, and of neurons, are too small for the experts that run to be multiplied with."""

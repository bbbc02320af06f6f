"""What stands in, at a small part of the cost, for the experts that a token skips."""

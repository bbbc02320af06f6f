"""Experts: an FFN's neurons in groups, what they compute, and the way back to the dense FFN."""

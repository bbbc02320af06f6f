"""Weights as int8 numbers times a scale an output channel, for inference."""

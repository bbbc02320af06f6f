"""Vectors of texts, which a cheaper model is to keep."""

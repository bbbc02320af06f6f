"""A text in, a text out, as T5 does everything."""

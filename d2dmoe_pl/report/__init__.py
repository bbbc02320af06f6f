"""What a chain has come to, on one page."""

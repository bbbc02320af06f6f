"""Text that needs no download: the docstrings of installed packages."""

"""A label for each word of a text, such as the entities that it names."""

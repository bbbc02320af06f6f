"""Text packed into blocks of tokens, for models that tell the next token or a masked one."""

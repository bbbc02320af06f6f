"""A budget in the place of a tau: which tau each layer has to have, by what was measured on the way down from dense."""

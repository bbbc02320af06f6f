"""Experts, routers, gating rules and the in-place conversion of a dense model. Knows no architecture by name."""

"""MoEBERT (arXiv 2204.07675): experts of important neurons, one of them for each token, distilled by layers."""

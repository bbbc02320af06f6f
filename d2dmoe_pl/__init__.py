"""Turn a trained dense Transformer into a Mixture-of-Experts with less compute per token."""

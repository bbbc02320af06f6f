"""torchmetrics over what the model does: cost, sparsity, load. They add up over batches and processes."""

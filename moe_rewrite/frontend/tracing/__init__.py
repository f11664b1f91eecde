"""What a model's code needs so that torch.export can trace it, and what a trace costs."""

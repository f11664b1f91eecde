"""Feed-forward experts as one operation."""

"""Feed-forward experts: what replaces a feed-forward region."""

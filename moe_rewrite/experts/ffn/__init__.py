"""Feed-forward experts: the call that replaces a feed-forward region."""

"""Forms that feed-forward experts take in ONNX, chosen site by site."""

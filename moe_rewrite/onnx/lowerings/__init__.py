"""Lowerings of feed-forward experts to ONNX operators, chosen for each site."""

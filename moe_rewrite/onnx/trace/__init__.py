"""A converted model as ONNX graphs, traced segment by segment."""

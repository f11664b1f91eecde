"""ONNX files: written tensor by tensor, and validated when read."""

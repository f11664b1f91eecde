"""ONNX files: written tensor by tensor, read with distrust."""
